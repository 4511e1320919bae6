"""Write the tables and pictures of docs/explanation/paper.md from saved results: `python research/paper.py [STUDIES]`.

The results are in lab/paper/results, one file per claim. With STUDIES, the folder that `seqmix paper`
wrote to, the results of all claims that it has are saved there first, without curves and details of the machine.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from seqmix.lab.figures.figure import Axis, Figure, Point, Series
from seqmix.lab.figures.writer import adaptive
from seqmix.lab.markdown import fill, table
from seqmix.lab.paper.claims import CLAIMS, FOLDER, OF_RUNS, values_of
from seqmix.lab.paper.verdict import (
    FIGURE_5,
    NAMES,
    TABLE_5,
    TABLE_6,
    TABLE_8,
    UNMEASURED,
    compare_losses,
    compare_sizes,
    interval,
    judge,
    sizes_of,
    weights_of,
)
from seqmix.lab.study.results import Results
from seqmix.lab.study.results_file import read_results
from seqmix.lab.study.study_figures import Plots
from seqmix.registry import write_file
from seqmix.research import DOCS

SAVED_RESULTS = FOLDER / "results"
"""Folder of the saved results."""
PAGES = DOCS / "explanation"
TARGET, PICTURES = PAGES / "paper.md", PAGES / "paper"
BATCHES = {1: "one sequence", 8: "eight sequences"}
"""Batch sizes of Figure 6, and their names."""
CHANGES = {
    "retnet": "",
    "no-gate": "`gate: none`, `expand_v: 1.0`, `ffn.expansion: 4.0`",
    "no-group-norm": "`head_norm: none`",
    "no-decay": "`decay: none`",
    "single-decay": "`decay: constant`, `gamma: 0.9921875`",
    "small-heads": "`n_heads: 16`",
}
"""Changed fields of each ablation of Table 6."""


def files(results_dir: Path = SAVED_RESULTS) -> dict[Path, str]:
    """Return the text of the page with its tables."""
    return {TARGET: fill(TARGET, {claim: part(claim, results_dir) for claim in PARTS})}


def drawings(results_dir: Path = SAVED_RESULTS) -> dict[Path, str]:
    """Return the picture of each measured claim in `DRAWINGS`, as SVG."""
    pictures = {}
    for claim, draw in DRAWINGS.items():
        if results := _read(claim, results_dir):
            figures = [
                replace(figure, series=[replace(series, name=NAMES[series.name]) for series in figure.series])
                for figure in draw(*results)
            ]
            pictures[PICTURES / f"{claim}.svg"] = adaptive(figures, 6.0 if len(figures) > 1 else 4.0)
    return pictures


def part(claim: str, results_dir: Path) -> list[str]:
    """Return the lines of a claim; if it is not measured yet, a line with the command that measures it."""
    results = _read(claim, results_dir)
    if not results:
        return [f"Not measured yet: `seqmix paper {' '.join(_names(claim))}`."]
    return [*PARTS[claim](*results), *_verdict(claim, results)]


def _verdict(claim: str, results: Sequence[Any]) -> list[str]:
    """Return the lines with the verdict of `seqmix paper`: its summary, after its table.

    The table is left out for Tables 5 and 6, whose own tables have its columns.
    """
    verdicts = [judge(name, values) for name, values in zip(_names(claim), results, strict=True)]
    rows = [row for verdict in verdicts for row in verdict.rows]
    if len(verdicts) > 1:
        sizes = [f"batch size {batch}" for batch, verdict in zip(BATCHES, verdicts, strict=True) for _ in verdict.rows]
        rows = [replace(row, name=f"{row.name}, {size}") for row, size in zip(rows, sizes, strict=True)]
    total = replace(verdicts[0], rows=rows)
    cells = [(row.name, row.paper, row.ours, row.direction) for row in rows]
    lines = [] if claim in ("table5", "table6") else ["", *table([*total.heads, "direction"], cells)]
    return [*lines, "", total.summary]


# ---- claims about quality


def table6(results: Results) -> list[str]:
    """Return the table of the ablations."""
    return _perplexities(results, TABLE_6, CHANGES)


def table5(results: Results) -> list[str]:
    """Return the table of other mixers: those in the paper, and additional ones."""
    return _perplexities(results, TABLE_5)


def _perplexities(
    results: Results, perplexities: Mapping[str, float], changes: Mapping[str, str] | None = None
) -> list[str]:
    """Return a table of the paper's perplexities and our losses, with the difference to RetNet of both.

    Args:
        results: the study.
        perplexities: the paper's perplexities, by entry.
        changes: a description of the change for each entry, for an additional column.
    """
    rows = []
    for one in compare_losses(results, perplexities):
        name = [NAMES[one.entry]] if changes is None else [NAMES[one.entry], changes[one.entry]]
        paper = "" if one.paper is None else f"{one.paper:+.3f}"
        cells = [one.perplexity or "", paper, f"{one.loss:.4f}", interval(one.ours), one.direction]
        rows.append((*name, *cells))
    first = ["model"] if changes is None else ["row", "change"]
    return table([*first, "paper", "Δ", "ours", "Δ (95 % interval)", "direction"], rows)


def figure5(results: Results) -> list[str]:
    """Return the tables of RetNet and the Transformer by model size."""
    paper_rows = [(size, ours, theirs, f"{math.log(ours / theirs):+.3f}") for size, (ours, theirs) in FIGURE_5.items()]
    compared = compare_sizes(results)
    rows = []
    for size, both in sizes_of(results).items():
        means = [f"{fmean(losses):.4f}" if losses else UNMEASURED for losses in both]
        rows.append((size, *means, interval(compared.get(size))))
    heads = ["RetNet:", "Transformer:"]
    return [
        *table(["paper, read off its plot", *heads, "RetNet - Transformer, nats:"], paper_rows),
        "",
        *table(["ours, `d_model`", *heads, "RetNet - Transformer (95 % interval):"], rows),
    ]


def table8(values: dict[str, Any]) -> list[str]:
    """Return the table of the loss with more and more context."""
    rows = []
    for entry, figures in TABLE_8.items():
        rows.append((f"paper, {NAMES[entry]}: perplexity", *figures, f"{math.log(figures[2] / figures[0]):+.3f}"))
    for model in values["models"]:
        name, losses = f"ours, {NAMES[model['entry']]}, `d_model` {model['d_model']}: nats", model["losses"]
        rows.append((name, *(f"{loss:.4f}" for loss in losses), f"{losses[-1] - losses[0]:+.4f}"))
    return table(["", "a quarter:", "a half:", "all:", "gain from a quarter to all, nats:"], rows)


def paradigms(values: dict[str, Any]) -> list[str]:
    """Return the table that compares the three paradigms of the same model."""
    rows = []
    for row in values["rows"]:
        losses = ", ".join(f"{name} {loss:.6f}" for name, loss in row["losses"].items())
        rows.append((NAMES[row["entry"]], row["dtype"], f"{row['length']:,}", losses, f"{row['difference']:.1e}"))
    heads = ["model", "dtype", "sequence length:", "nats per token, by paradigm", "largest difference per token:"]
    return table(heads, rows)


# ---- claims about speed and memory


def table4(results: Results) -> list[str]:
    """Return the table of training speed and memory by sequence length."""
    timed = {(row.entry, row.length): row for row in results.speed.train}
    rows = []
    for length in dict.fromkeys(row.length for row in results.speed.train):
        both = timed["retnet", length], timed["transformer", length]
        speeds = [row.tokens_per_second or math.nan for row in both]
        memory = [row.memory_bytes or math.nan for row in both]
        cells = [*(f"{speed:,.0f}" for speed in speeds), f"{speeds[0] / speeds[1]:.2f}"]
        rows.append((f"{length:,}", *cells, *map(_mib, memory), f"{memory[1] / memory[0]:.2f}"))
    return table(["sequence length", *_comparison_heads("tokens/s"), *_comparison_heads("peak memory")], rows)


def figure6(*results_by_batch: Results) -> list[str]:
    """Return the table of decoding time and memory by context length, for each batch size of `BATCHES`."""
    rows = []
    for batch, results in zip(BATCHES, results_by_batch, strict=True):
        weights = weights_of(results)
        timed = {(row.entry, row.context): row for row in results.speed.decode}
        for context in dict.fromkeys(row.context for row in results.speed.decode):
            both = timed["retnet", context], timed["transformer", context]
            times = [1e3 * (row.seconds or math.nan) for row in both]
            memory = [weights[row.entry] + (row.state_bytes or 0) for row in both]
            cells = [*(f"{time:.2f}" for time in times), f"{times[1] / times[0]:.1f}"]
            rows.append((batch, f"{context:,}", *cells, *map(_mib, memory), f"{memory[1] / memory[0]:.1f}"))
    return table(
        ["batch size", "context:", *_comparison_heads("ms per token"), *_comparison_heads("weights and state")], rows
    )


PARTS: dict[str, Callable[..., list[str]]] = {
    "table5": table5,
    "table6": table6,
    "figure5": figure5,
    "table8": table8,
    "paradigms": paradigms,
    "table4": table4,
    "figure6": figure6,
}
"""Claims, each with the function that returns the lines of its part of the page from the claim's results."""


# ---- pictures


def draw_figure6(*results_by_batch: Results) -> list[Figure]:
    """Return the figures of decoding time and memory by context length, for each batch size of `BATCHES`."""
    figures = []
    for batch, results in zip(BATCHES.values(), results_by_batch, strict=True):
        time = next(figure for figure in Plots(results).speed() if figure.name == "decode-time")
        figures.append(replace(time, title=f"{time.title}, {batch}"))
        series = []
        for style, (entry, weights) in enumerate(weights_of(results).items()):
            rows = [row for row in results.speed.decode if row.entry == entry]
            series.append(Series(entry, [Point(row.context, weights + (row.state_bytes or 0)) for row in rows], style))
        memory = Axis("memory", unit="bytes", from_zero=True, log=False)
        name = f"memory-{batch.replace(' ', '-')}"
        figures.append(Figure(name, f"Weights and state, {batch}", "", time.x, memory, series))
    return [replace(figure, name=f"{figure.name}-{i}") for i, figure in enumerate(figures)]


DRAWINGS: dict[str, Callable[..., list[Figure]]] = {
    "figure5": lambda results: [figure for figure in Plots(results).outcomes() if "-over-" in figure.name],
    "table4": lambda results: Plots(results).speed(),
    "figure6": draw_figure6,
}
"""Claims with a picture, each with the function that returns the figures of the picture from the claim's results."""


# ---- results


def _names(claim: str) -> list[str]:
    """Return the names of the results that a claim needs."""
    return ["figure6", "figure6-batch8"] if claim == "figure6" else [claim]


def _read(claim: str, results_dir: Path) -> list[Any]:
    """Read the results of a claim; an empty list if any of them is missing."""
    result_files = [results_dir / f"{name}.json" for name in _names(claim)]
    if not all(file.is_file() for file in result_files):
        return []
    return [json.loads(file.read_text()) if claim in OF_RUNS else read_results(file) for file in result_files]


def _comparison_heads(quantity: str) -> list[str]:
    """Return the heads of three columns: a quantity of RetNet, of the Transformer, and their ratio."""
    return [f"{quantity}: RetNet:", "Transformer:", "ratio:"]


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def save(studies: Path, results_dir: Path = SAVED_RESULTS) -> None:
    """Save the values of all claims that a folder of studies has, without curves and details of the machine."""
    for claim in CLAIMS:
        file = values_of(claim, "cpu", studies)
        if not file.is_file():
            continue
        values = json.loads(file.read_text(encoding="utf-8"))
        for run in values.get("runs", []):
            run.update(history=[], evaluations=[])
        if "machine" in values:
            values["machine"] = {key: values["machine"].get(key) for key in ("threads", "device", "torch")}
        results_dir.mkdir(parents=True, exist_ok=True)
        write_file(json.dumps(values, indent=1) + "\n", results_dir / f"{claim}.json")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        save(Path(sys.argv[1]))
    for file, text in (files() | drawings()).items():
        write_file(text, file)
