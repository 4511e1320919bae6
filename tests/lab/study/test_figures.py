"""Figures as values, their colours, and how Altair and vl-convert draw them."""

import math
import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from study_results import AWKWARD, X, Y, figure

from seqmix.lab.figures import theme
from seqmix.lab.figures.figure import (
    ACCURACY,
    Axis,
    Figure,
    Point,
    Series,
    by_legend,
    drawable,
    legend,
    resolve,
    thin,
)  # fmt: skip
from seqmix.lab.figures.writer import adaptive, draw
from seqmix.lab.units import number, quantity


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.25, "0.25"), (3e-4, "3e-4"), (1.5e-9, "1.5e-9"), (-0.5, "-0.5"), (42, "42"), (1234.4, "1,234"),
        (9999, "9,999"), (10_000, "10k"), (204_800, "205k"), (999_600, "1M"), (1.5e6, "1.5M"), (7.2e15, "7.2P"),
    ],
)  # fmt: skip
def test_numbers_are_formatted_briefly(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("axis", "values", "kinds"),
    [
        (Y, [1.0, 19.0], ("linear", "log")),
        (Y, [1.0, 21.0], ("log", "linear")),
        (Axis("y", log=True), [1.0, 2.0], ("log", "linear")),
        (Axis("y", log=False), [1.0, 1e6], ("linear", "log")),
        (Axis("y", ticks=[512, 4096]), [512, 4096], ("log", "linear")),
        (Y, [0.0, 1e6], ("linear",)),
        (Axis("y", log=True), [-1.0, 2.0], ("linear",)),
        (Axis("memory", noise=2.0**20), [2e5, 3e9], ("linear",)),  # the allocator's noise is not blown up
        (Axis("slice", names=["easy", "hard"]), [], ()),
    ],
)
def test_axis_offers_log_scale_when_values_allow(axis, values, kinds):
    assert resolve(axis, values).kinds == kinds


@pytest.mark.parametrize(
    ("axis", "values", "label"),
    [
        (Axis("memory", unit="bytes"), [1e8, 3e9], "memory (MiB)"),
        (Axis("memory", unit="bytes"), [1e9, 3e9], "memory (GiB)"),
        (Axis("time", unit="seconds"), [0.002, 0.01], "time (ms)"),
        (Axis("time", unit="seconds"), [100, 200], "time (min)"),
        (ACCURACY, [0.2, 0.9], "accuracy (%)"),
        (Axis("tokens"), [1, 2], "tokens"),
    ],
)
def test_axis_unit_is_chosen_from_the_values(axis, values, label):
    assert resolve(axis, values).label == label
    assert quantity(3e9, "bytes") == "2.79 GiB"


def test_non_finite_points_are_dropped():
    first, third = Point(1, 4.0, 3.0, 5.0), Point(3, 6.0, 5.0, 7.0)
    one = Series("a", [first, Point(2, math.nan, 0.0, 0.0), third, Point(math.inf, 7.0, 0.0, 0.0)])
    nothing = Series("b", [Point(1, math.nan)])
    (found,) = drawable([Figure("f", "t", "c", X, Y, [one, nothing])])
    assert [series.points for series in found.series] == [[first, third]]
    assert drawable([Figure("f", "t", "c", X, Y, [nothing])]) == []


def test_thinned_line_keeps_its_extremes():
    values = [float(i % 7) for i in range(10_000)]
    values[4321], values[8765] = 99.0, -99.0
    kept = list(thin(values, 240))
    assert {0, 4321, 8765, 9_999} <= set(kept)
    assert len(kept) <= 242
    assert kept == sorted(kept)
    assert list(thin(values[:200], 240)) == list(range(200))


def test_rows_use_axis_units():
    rows = figure([1, 2], [0.5, 0.25], [0.4, 0.2], [0.6, 0.3], y=ACCURACY).rows()
    assert [(row["x"], row["y"], row["low"], row["high"]) for row in rows] == [
        (1, 50, 40, pytest.approx(60)),
        (2, 25, 20, 30),
    ]


def test_scatter_plot_keeps_all_points():
    heads = figure([layer for layer in range(50) for _ in range(16)], range(800), joined=False)
    assert len([row for row in heads.rows() if row.get("marker")]) == 800
    slices = figure(list("abcdefghijklmnopq"), range(17), x=Axis("x", names="abcdefghijklmnopq"))
    assert all(row["marker"] for row in slices.rows())


def test_single_point_series_gets_a_marker_or_error_bar():
    measured = Series("run", [Point(1, 4.9)], faint=True)
    (row,) = Figure("f", "t", "c", X, Y, [measured], smooth=True).rows()
    assert row["faint"]
    assert row["marker"]
    curves = [Series("short", [Point(1, 2, 1, 3)]), Series("long", [Point(x, 2, 1, 3) for x in range(99)])]
    short, *long = Figure("f", "t", "c", X, Y, curves, smooth=True).rows()
    assert short["dodge"] == 0  # an error bar
    assert not any("dodge" in row for row in long)


def test_error_bars_shift_only_when_they_share_a_category():
    names = Axis("", names=["a", "b"])
    apart = Figure("f", "t", "c", names, Y, [Series(name, [Point(name, 2, 1, 3)]) for name in "ab"], joined=False)
    assert {row["dodge"] for row in apart.rows()} == {0}
    both = replace(apart, series=[Series(name, [Point("a", 2, 1, 3)]) for name in "ab"])
    assert len({row["dodge"] for row in both.rows()}) == 2


def test_non_finite_spread_has_no_error_bar():
    (row,) = figure([1], [2], [1], [math.inf]).rows()
    assert "low" not in row


def test_many_error_bars_stay_close_to_their_x():
    bars = [Point(1, 2, 1, 3), Point(2, 2, 1, 3)]
    many = Figure("f", "t", "c", X, Y, [Series(f"{i}", bars, i) for i in range(26)])
    shifts = [row["dodge"] for row in many.rows()]
    assert len(set(shifts)) == 26
    assert max(shifts) - min(shifts) <= 12
    scatter = replace(many, joined=False)  # whose x values are measured
    assert {row["dodge"] for row in scatter.rows()} == {0}


def test_error_bars_of_different_series_do_not_overlap():
    series = [Series(name, [Point(1, 2, 1, 3), Point(2, 2, 1, 3)]) for name in "abc"]
    bars = Figure("f", "t", "c", X, Y, series)
    assert not bars.banded
    assert len({row["dodge"] for row in bars.rows() if row["x"] == 1}) == 3
    curves = Figure("f", "t", "c", X, Y, series, smooth=True)
    assert curves.banded
    assert not [row for row in curves.rows() if "dodge" in row]


def test_legend_lists_each_name_once():
    points = [Point(1, 1)]
    series = [Series("b", points, style=1), Series("a", points), Series("b", points, style=1, faint=True)]
    assert list(legend([Figure("f", "t", "c", X, Y, series)] * 2).items()) == [("a", 0), ("b", 1)]


def test_figures_with_consistent_styles_share_a_legend():
    def one(**styles):
        return Figure("f", "t", "c", X, Y, [Series(name, [Point(1, 1)], style) for name, style in styles.items()])

    agreeing = [one(a=0, b=1), one(b=1), one(c=2)]
    assert by_legend(agreeing) == [agreeing]
    same_look, other_look = one(d=0), one(d=1)
    assert by_legend([*agreeing, same_look, other_look]) == [agreeing, [same_look], [other_look]]
    assert by_legend([]) == []


# ---- drawings


@pytest.mark.slow
@pytest.mark.parametrize("awkward", AWKWARD, ids=lambda one: one.name)
def test_chart_specs_are_valid_vega_lite(awkward):
    alt = pytest.importorskip("altair")
    from seqmix.lab.figures import charts

    for spec in (charts.page_spec(awkward), charts.paper_spec([awkward], 200, 1)):
        alt.Chart.from_dict({key: value for key, value in spec.items() if key != "datasets"})  # which checks it
        assert spec["datasets"][awkward.name] == awkward.rows()


@pytest.mark.parametrize(("width", "count"), [(3.25, 1), (6.75, 2), (6.75, 3)])
def test_drawing_fits_its_column_width(tmp_path, width, count):
    pytest.importorskip("altair")
    file = tmp_path / "figure.svg"
    draw(AWKWARD[7 : 7 + count], file, width=width)
    text = file.read_text()
    size = re.search(r'width="([\d.]+)pt"', text)
    assert float(size[1]) == pytest.approx(72 * width, abs=1.5)
    assert {float(font) for font in re.findall(r'font-size="([\d.]+)px"', text)} <= {8.0, 8.5}
    assert "var(" not in text
    assert ">trained</text>" in text


def texts_of(svg: str, role: str) -> list[str]:
    """The texts of all marks with a role."""
    marks = re.findall(rf'<g class="mark-text role-{role}\b.*?</g>', svg, re.DOTALL)
    return re.findall(r"<text[^>]*>([^<]*)</text>", "".join(marks))


def colors_of(svg: str, role: str) -> list[str]:
    """The colours of all symbols with a role."""
    marks = re.findall(rf'<g class="mark-symbol role-{role}\b.*?</g>', svg, re.DOTALL)
    return re.findall(r'fill="(#\w+)"', "".join(marks))


def test_layer_axis_has_integer_ticks_and_all_heads_are_drawn(tmp_path):
    pytest.importorskip("altair")
    layers = [Series(f"layer {i}", [Point(i, 1.5 * head) for head in range(16)], i) for i in range(3)]
    for count, ticks in ((1, ["0"]), (2, ["0", "1"]), (3, ["0", "1", "2"])):
        draw([Figure("f", "t", "c", Axis("layer"), Y, layers[:count], joined=False)], tmp_path / "f.svg")
        svg = (tmp_path / "f.svg").read_text()
        assert len(colors_of(svg, "mark")) == 16 * count
        assert texts_of(svg, "axis-label")[: len(ticks)] == ticks
        assert "clip-path" not in svg


def test_accuracy_axis_has_no_ticks_above_100_percent(tmp_path):
    pytest.importorskip("altair")
    draw([figure([1, 2], [0.02, 1.0], y=ACCURACY)], tmp_path / "f.svg")
    assert texts_of((tmp_path / "f.svg").read_text(), "axis-label") == ["1", "2", "0", "20", "40", "60", "80", "100"]


def test_each_legend_matches_the_colours_of_its_figures(tmp_path):
    pytest.importorskip("altair")
    points = [Point(1, 1), Point(2, 2)]
    first = Figure("f", "first", "c", X, Y, [Series("a", points, 0), Series("b", points, 1)])
    second = Figure("g", "second", "c", X, Y, [Series("b", points, 1), Series("c", points, 2)])
    other = Figure("h", "other", "c", X, Y, [Series("d", points, 0), Series("e", points, 1)])
    draw([first, second, other], tmp_path / "f.svg", width=6.75)
    svg = (tmp_path / "f.svg").read_text()
    blue, orange, green = theme.LIGHT_LINES[:3]
    assert texts_of(svg, "legend-label") == ["a", "b", "c", "d", "e"]
    assert colors_of(svg, "legend-symbol") == [blue, orange, green, blue, orange]
    drawn = colors_of(svg, "mark")
    assert sorted(drawn) == sorted([blue] * 4 + [orange] * 6 + [green] * 2)


def test_long_legend_is_complete_and_fits_column_width(tmp_path):
    pytest.importorskip("altair")
    long = [f"a name that somebody has written without a thought of figures, number {i}" for i in range(32)]
    draw(
        [Figure("f", "t", "c", X, Y, [Series(name, [Point(1, i)], i) for i, name in enumerate(long)])],
        tmp_path / "f.svg",
    )
    svg = (tmp_path / "f.svg").read_text()
    assert float(re.search(r'width="([\d.]+)pt"', svg)[1]) == pytest.approx(72 * 3.25, abs=1.5)
    assert [f"number {i}" for i in range(32) if f"number {i}<" not in svg] == []


def test_category_names_are_not_truncated(tmp_path):
    pytest.importorskip("altair")
    names = [f"a rather long name of a slice, number {i}" for i in range(5)]
    draw([figure(names, range(5), x=Axis("slice", names=names))], tmp_path / "f.svg")
    assert texts_of((tmp_path / "f.svg").read_text(), "axis-label")[:5] == names


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_drawing_can_be_saved_as_png_or_pdf(tmp_path, ending, begins):
    pytest.importorskip("altair")
    draw([AWKWARD[6]], tmp_path / f"a.{ending}")
    content = (tmp_path / f"a.{ending}").read_bytes()
    assert content.startswith(begins)
    if ending == "pdf":
        assert re.search(rb"/MediaBox \[0 0 23[345]", content)


def test_page_drawing_supports_light_and_dark_schemes():
    pytest.importorskip("altair")
    text = adaptive([AWKWARD[6]], 4.0)
    assert theme.LIGHT["paper"] in text
    assert re.search(rf"prefers-color-scheme:dark.*{theme.DARK['paper']}", text)
    assert 'fill="var(--line-0)"' in text


# ---- colours are seen on their page, and told apart by people with each kind of colour vision


SCHEMES = {"light": (theme.LIGHT, theme.LIGHT_LINES), "dark": (theme.DARK, theme.DARK_LINES)}
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
def test_colours_have_enough_contrast_with_the_page(scheme):
    names, lines = SCHEMES[scheme]
    for ground in (names["paper"], names["panel"]):
        assert contrast(names["ink"], ground) > 7
        assert contrast(names["muted"], ground) > 4.5
    assert [line for line in lines if contrast(line, names["paper"]) < 3] == []


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_line_colours_are_distinguishable(scheme, sight):
    seen = [lab(np.array(SIGHT[sight]) @ linear(color)) for color in SCHEMES[scheme][1]]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 14
    assert len({(theme.color(i), theme.shape(i)) for i in range(64)}) == 64  # points
    assert len({(theme.color(i), theme.line_css(i)) for i in range(32)}) == 32  # lines
