"""Colours are seen on their page, and told apart by people with each kind of colour vision."""

from itertools import combinations

import numpy as np
import pytest

from seqmix.experiments import palette

SCHEMES = {"light": (palette.LIGHT, palette.LIGHT_LINES), "dark": (palette.DARK, palette.DARK_LINES)}
SIGHT = {
    "usual": np.eye(3),
    # Machado, Oliveira and Fernandes (2009), severity 1
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(color: str) -> np.ndarray:
    """Linear light, red, green and blue, of a colour of sRGB."""
    value = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of luminances."""
    low, high = sorted(float(linear(color) @ [0.2126, 0.7152, 0.0722]) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(light: np.ndarray) -> np.ndarray:
    """CIE 1976 L*a*b* of linear sRGB, white D65."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ light.clip(0, 1)
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_everything_stands_out_from_the_page(scheme):
    names, lines = SCHEMES[scheme]
    for behind in (names[palette.PAPER], names[palette.PANEL]):
        assert contrast(names[palette.INK], behind) > 7
        assert contrast(names[palette.MUTED], behind) > 4.5
    assert [line for line in lines if contrast(line, names[palette.PAPER]) < 3] == []


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_lines_are_told_apart(scheme, sight):
    seen = [lab(np.array(SIGHT[sight]) @ linear(color)) for color in SCHEMES[scheme][1]]
    distances = {pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in combinations(range(len(seen)), 2)}
    # lines that share a shape of markers must differ more
    assert min(distances.values()) > 14
    assert min(distances[pair] for pair in distances if palette.marker(pair[0]) == palette.marker(pair[1])) > 25


def test_no_two_lines_of_a_chart_look_alike():
    looks = {(palette.color(i), palette.dash(i), palette.marker(i)) for i in range(24)}
    assert len(looks) == 24
