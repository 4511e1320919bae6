"""Axes: where a value lies, which numbers stand beside it, and what cannot be drawn."""

import math

import pytest

from seqmix.experiments.chart import ACCURACY, Axis, Chart, Line, Point, drawable, legend, number, resolve, thinned


def texts(axis: Axis, values: list[float]) -> list[str]:
    return [text for _, text in resolve(axis, values).ticks]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.25, "0.25"), (3e-4, "3e-4"), (1.5e-9, "1.5e-9"), (-0.5, "-0.5"), (42, "42"), (1234.4, "1,234"),
        (9999, "9,999"), (10_000, "10k"), (204_800, "205k"), (999_600, "1M"), (1.5e6, "1.5M"), (7.2e15, "7.2P"),
    ],
)  # fmt: skip
def test_a_number_is_short(value, text):
    assert number(value) == text


def test_round_numbers_have_the_decimals_of_their_step():
    assert texts(Axis("loss"), [1.62, 1.73]) == ["1.625", "1.650", "1.675", "1.700", "1.725"]
    assert texts(Axis("loss"), [1.1, 3.9]) == ["1", "2", "3", "4"]
    assert texts(Axis("tokens"), [0, 1_600_000]) == ["0", "0.5M", "1.0M", "1.5M"]
    assert texts(Axis("tokens per second"), [0, 12_000]) == ["0", "2.5k", "5.0k", "7.5k", "10.0k"]


def test_values_that_span_decades_get_a_logarithmic_axis():
    assert not resolve(Axis("loss"), [1.0, 19.0]).log
    assert resolve(Axis("loss"), [1.0, 21.0]).log
    assert resolve(Axis("loss", log=True), [1.0, 2.0]).log
    assert not resolve(Axis("loss", log=False), [1.0, 1e6]).log
    assert not resolve(Axis("loss"), [0.0, 1e6]).log  # zero has no place on one
    assert not resolve(Axis("loss", log=True), [-1.0, 2.0]).log


def test_a_logarithmic_axis_has_powers_as_ticks():
    assert texts(Axis("loss"), [0.01, 100]) == ["0.01", "0.1", "1", "10", "100"]
    assert texts(Axis("state", unit="bytes", log=True), [2.0**16, 2.0**19]) == ["64", "128", "256", "512"]


def test_ticks_may_be_chosen():
    scale = resolve(Axis("tokens", ticks=[512, 1024, 4096]), [512, 4096])
    assert scale.log
    assert scale.ticks == [(512, "512"), (1024, "1,024"), (4096, "4,096")]


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
def test_the_unit_suits_the_values(axis, values, label):
    assert resolve(axis, values).label == label


def test_a_value_is_read_in_its_unit():
    assert resolve(Axis("time", unit="seconds"), [0.002, 0.01]).read(0.0042) == "4.2 ms"
    assert resolve(Axis("slice", names=["easy", "hard"]), [0, 1]).read(1) == "hard"


@pytest.mark.parametrize("axis", [Axis("a"), Axis("a", log=True), Axis("a", zero=True), Axis("a", unit="bytes")])
@pytest.mark.parametrize("values", [[7.0], [7.0, 7.0], [1e-9, 2e-9], [3.0, 1e12], [0.0], [-4.0, -2.0]])
def test_values_and_ticks_lie_on_the_axis(axis, values):
    scale = resolve(axis, values)
    places = [scale.position(value) for value in (*values, *(value for value, _ in scale.ticks))]
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    assert places[: len(values)] == sorted(places[: len(values)])
    assert len(scale.ticks) >= 2
    assert len({text for _, text in scale.ticks}) == len(scale.ticks)


def test_an_axis_may_begin_at_zero():
    assert resolve(Axis("speed", zero=True), [50.0, 100.0]).position(0) == 0
    assert resolve(Axis("speed", zero=True), [-50.0, 100.0]).position(-50) > 0


def test_points_that_are_no_numbers_are_left_out():
    first, third = Point(1, 4.0, 3.0, 5.0), Point(3, 6.0, 5.0, 7.0)
    line = Line("a", [first, Point(2, math.nan, 0.0, 0.0), third, Point(math.inf, 7.0, 0.0, 0.0)])
    nothing = Line("b", [Point(1, math.nan)])
    (chart,) = drawable([Chart("t", "c", Axis("x"), Axis("y"), [line, nothing])])
    (kept,) = chart.lines
    assert kept.points == [first, third]
    assert drawable([Chart("t", "c", Axis("x"), Axis("y"), [nothing])]) == []


def test_a_thinned_line_keeps_its_extremes():
    values = [float(i % 7) for i in range(10_000)]
    values[4321], values[8765] = 99.0, -99.0
    kept = list(thinned(values, 240))
    assert {0, 4321, 8765, 9_999} <= set(kept)
    assert len(kept) <= 242
    assert kept == sorted(kept)
    assert list(thinned(values[:200], 240)) == list(range(200))


def test_a_legend_has_each_name_once():
    points = [Point(1, 1)]
    lines = [Line("b", points, style=1), Line("a", points, style=0), Line("b", points, style=1, faint=True)]
    assert legend([Chart("t", "c", Axis("x"), Axis("y"), lines)] * 2) == [("a", 0), ("b", 1)]
