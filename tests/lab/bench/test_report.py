"""Benchmark reports as JSON, Markdown, terminal tables and figures."""

import io
import json

import pytest
from rich.console import Console

from seqmix.cli.commands.bench import show
from seqmix.lab.bench.benchmark import Report, Row
from seqmix.lab.bench.figures import figures_of
from seqmix.lab.bench.report import from_json, markdown, to_json
from seqmix.lab.bench.timing import Spread
from seqmix.lab.figures import theme

MACHINE = {
    "device": "cpu",
    "processor": "a processor",
    "threads": 2,
    "torch": "2.13",
    "product_flops_per_second": 2e11,
    "copy_bytes_per_second": 1.5e10,
}


def row(name, length, milliseconds, **more):
    seconds = Spread(milliseconds / 1e3, milliseconds / 2e3, milliseconds / 5e2)
    ratio, share = Spread(milliseconds / 20, 0.5, 2.0), Spread(0.625, 0.5, 0.75)
    given = {"what": "train", "tokens": 2048, "seconds": seconds, "ratio": ratio, "share": share, "floor": 0.0125}
    return Row(name=name, length=length, **(given | {"peak_bytes": 3 * 2**20, "parameters": 1234567} | more))


@pytest.fixture
def report():
    return Report(
        benchmark="train",
        title="A training step",
        machine=MACHINE,
        settings={"dtype": "float32", "repeat": 5, "interleaved": True},
        rows=[
            row("seqmix", 512, 20.0),
            row("llama", 512, 30.0),
            Row(what="train", length=512, name="fla", skipped="its kernels run on a GPU only"),
            row("seqmix", 2048, 80.0),
            Row(what="train", length=2048, name="llama", skipped="would take about 300 s"),
            Row(what="train", length=2048, name="fla", skipped="its kernels run on a GPU only"),
        ],
        notes=("A note.",),
    )


def shown(report, width):
    to = io.StringIO()
    show(report, Console(file=to, width=width, markup=False, highlight=False))
    return to.getvalue()


def test_json_report_round_trips(report):
    assert from_json(to_json(report)) == report
    first = json.loads(to_json(report))["rows"][0]
    assert first["tokens_per_second"] == pytest.approx(2048 / 0.020)
    assert first["seconds"] == {"median": 0.02, "low": 0.01, "high": 0.04}


def test_markdown_table_lists_skipped_rows_with_reasons(report):
    lines = markdown(report).splitlines()
    assert lines[0] == (
        "A training step. a processor, 2 threads, torch 2.13, float32; medians of 5, interleaved. "
        "In the same rounds: product 200 GFLOP/s, copy 15.0 GB/s."
    )
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert len({len(cells) for cells in table}) == 1
    found = dict(zip(table[0], table[3], strict=True))
    assert found["implementation"] == "llama"
    assert found["ms"] == "30.0"
    assert found["ratio"] == "1.50"
    assert found["share"] == "62%"
    assert found["peak MiB"] == "3.0"
    assert "- llama skipped (2,048): would take about 300 s" in lines
    assert "- fla skipped: its kernels run on a GPU only" in lines
    assert "- A note." in lines
    assert "state MiB" not in table[0]


def test_narrow_terminal_drops_columns_instead_of_truncating(report):
    wide, narrow = shown(report, 160), shown(report, 60)
    assert "parameters" in wide
    assert "parameters" not in narrow
    assert all(len(line) <= 60 for line in narrow.splitlines() if "seqmix" in line)
    for text in (wide, narrow):
        assert "…" not in text
        assert "1.50" in text
        assert "its kernels run on a GPU only" in text


def test_multiple_parts_get_their_own_labels_and_figures(report):
    rows = [*report.rows, row("seqmix", 512, 20.0, what="forward + backward")]
    both = Report(**(vars(report) | {"rows": rows}))
    assert "| what | T | implementation |" in markdown(both)
    assert [figure.name for figure in figures_of(both)] == ["train", "train-forward-backward", "memory"]


def test_report_works_with_only_skipped_rows(report):
    nothing = Report(**(vars(report) | {"rows": [x for x in report.rows if x.skipped], "machine": MACHINE}))
    assert "skipped" in shown(nothing, 100)
    assert from_json(to_json(nothing)) == nothing
    assert figures_of(nothing) == []


def test_time_and_memory_are_plotted_over_length(report):
    rows = [*report.rows, row("seqmix-compiled", 512, 5.0)]
    time, memory = figures_of(Report(**(vars(report) | {"rows": rows})))
    assert (time.name, memory.name) == ("train", "memory")
    seqmix, llama, compiled = time.series
    assert (seqmix.name, seqmix.points) == ("seqmix", [(512, 0.02, 0.01, 0.04), (2048, 0.08, 0.04, 0.16)])
    assert (llama.name, llama.points) == ("llama", [(512, 0.03, 0.015, 0.06)])
    assert theme.color(compiled.style) == theme.color(seqmix.style) != theme.color(llama.style)
    assert theme.dash(compiled.style) != theme.dash(seqmix.style)
    assert [point.y for point in memory.series[0].points] == [3 * 2**20] * 2


def test_implementations_and_compiled_variants_have_distinct_styles(report):
    names = [f"library {i}{end}" for i in range(10) for end in ("", "-compiled")]
    rows = [row(name, 512, 20.0, peak_bytes=0) for name in names]
    time, memory = figures_of(Report(**(vars(report) | {"rows": rows})))
    assert len({one.style for one in time.series}) == 20
    assert [(one.name, one.points[0].y) for one in memory.series] == [(name, 0) for name in names]
