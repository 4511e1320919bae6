"""The table of what a token costs at two lengths."""

import re

import pytest
import typer

from seqmix.benchmarks import lengths


def test_the_presets_are_those_whose_state_is_constant():
    names = lengths.constant_presets()
    assert {"retnet-tiny", "mamba2-tiny", "gated-delta-net-tiny"} <= set(names)
    assert not {"attention-tiny", "hyena-tiny", "hybrid-tiny"} & set(names)


def test_a_line_has_both_lengths_and_their_ratio():
    head, _, line = lengths.lines(["retnet-tiny"], 16, 64)
    assert "at 16 | at 64" in head
    name, first, second, ratio, *_ = (cell.strip() for cell in line.strip("|").split("|"))
    assert name == "`retnet-tiny`"
    assert float(first) > 0
    assert float(second) > 0
    assert re.fullmatch(r"\d+\.\d\d", ratio)


def test_what_is_not_there_is_refused():
    with pytest.raises(typer.BadParameter, match="no such preset 'hyena-tiny'"):
        lengths.main(preset=["hyena-tiny"])
    with pytest.raises(typer.BadParameter, match="64 is no multiple of 24"):
        lengths.main(24, 64)
