"""Write the tables and pictures of docs/explanation/paper.md from saved results: `python docs/paper.py`.

The results are in experiments/retnet_paper/results, one file per claim, written by `seqmix paper CLAIM`. The paper's
own numbers are constants in this file. Numbers that the paper only plots were read off its plots, and are marked so.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from seqmix.experiments.figures.figure import Axis, Figure, Point, Series
from seqmix.experiments.figures.writer import adaptive
from seqmix.experiments.pages import fill, table
from seqmix.experiments.results import Results, read_results
from seqmix.experiments.retnet_paper.claims import KEPT, OF_RUNS
from seqmix.experiments.study_figures import Plots
from seqmix.registry import write_file

PAGES = Path(__file__).with_name("explanation")
TARGET, PICTURES = PAGES / "paper.md", PAGES / "paper"
BATCHES = {1: "one sequence", 8: "eight sequences"}
"""Batch sizes of Figure 6, and their names."""

TABLE_5 = {"retnet": 26.05, "rwkv": 30.92, "h3": 29.97, "hyena": 32.08, "linear-transformer": 40.24}
"""In-domain perplexity at 200M parameters."""
TABLE_6 = {
    "retnet": (26.05, ""),
    "no-gate": (27.84, "`gate: none`, `expand_v: 1.0`, `ffn.expansion: 4.0`"),
    "no-group-norm": (27.54, "`head_norm: none`"),
    "no-decay": (27.86, "`decay: none`"),
    "single-decay": (27.02, "`decay: constant`, `gamma: 0.9921875`"),
    "small-heads": (27.68, "`n_heads: 16`"),
}
"""In-domain perplexity at 200M parameters, and the changed fields of each ablation."""
TABLE_8 = {"transformer": (13.55, 12.56, 12.35), "retnet": (13.09, 12.14, 11.98)}
"""Perplexity with a quarter, a half and all of a context of 2,048 tokens."""
FIGURE_5 = {"1.3B": (14.8, 14.5), "2.7B": (13.2, 13.4), "6.7B": (12.8, 13.0)}
"""Perplexity of RetNet and of the Transformer, read off the plot (to within 0.1)."""
NAMES = {
    "retnet": "RetNet",
    "no-gate": "no swish gate",
    "no-group-norm": "no GroupNorm",
    "no-decay": "no decay (gamma = 1)",
    "single-decay": "one decay for all heads",
    "small-heads": "head dimension, a quarter",
    "linear-transformer": "Linear Transformer",
    "hyena": "Hyena",
    "rwkv": "RWKV-4",
    "h3": "H3",
    "transformer": "Transformer (xPos)",
    "gla": "GLA",
    "gated-delta-net": "Gated DeltaNet",
}
"""Display names of the entries, as in the paper."""


def files(results_dir: Path = KEPT) -> dict[Path, str]:
    """Return the text of the page with its tables."""
    return {TARGET: fill(TARGET, {claim: part(claim, results_dir) for claim in PARTS})}


def drawings(results_dir: Path = KEPT) -> dict[Path, str]:
    """Return the picture of each measured claim in `DRAWN`, as SVG."""
    pictures = {}
    for claim, draw in DRAWN.items():
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
    return PARTS[claim](*results) if results else [f"Not measured yet: `seqmix paper {' '.join(_names(claim))}`."]


# ---- claims about quality


def table6(results: Results) -> list[str]:
    """Return the table of the ablations."""
    changes = {entry: change for entry, (_, change) in TABLE_6.items()}
    return _compare_perplexities(results, {entry: figure for entry, (figure, _) in TABLE_6.items()}, changes)


def table5(results: Results) -> list[str]:
    """Return the table of other mixers: those in the paper, and additional ones."""
    return _compare_perplexities(results, TABLE_5)


def figure5(results: Results) -> list[str]:
    """Return the tables of RetNet and the Transformer by model size."""
    paper_rows = [(size, ours, theirs, f"{math.log(ours / theirs):+.3f}") for size, (ours, theirs) in FIGURE_5.items()]
    rows = []
    for width in dict.fromkeys(run.variant["model.d_model"] for run in results.runs):
        losses = [_losses(results, entry, width) for entry in ("retnet", "transformer")]
        means = [f"{mean(by_seed.values()):.4f}" for by_seed in losses]
        rows.append((width, *means, _signed(_differences(*losses))))
    heads = ["RetNet:", "Transformer:"]
    return [
        *table(["paper, read off its plot", *heads, "RetNet - Transformer, nats:"], paper_rows),
        "",
        *table(["ours, `d_model`", *heads, "RetNet - Transformer, each seed:"], rows),
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
        weights = _weights(results)
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
"""The function that writes each region of the page, from the results of its claim."""


# ---- pictures


def draw_figure6(*results_by_batch: Results) -> list[Figure]:
    """Return the figures of decoding time and memory by context length, for each batch size of `BATCHES`."""
    figures = []
    for batch, results in zip(BATCHES.values(), results_by_batch, strict=True):
        time = next(figure for figure in Plots(results).speed() if figure.name == "decode-time")
        figures.append(replace(time, title=f"{time.title}, {batch}"))
        series = []
        for style, (entry, weights) in enumerate(_weights(results).items()):
            rows = [row for row in results.speed.decode if row.entry == entry]
            series.append(Series(entry, [Point(row.context, weights + (row.state_bytes or 0)) for row in rows], style))
        memory = Axis("memory", unit="bytes", zero=True, log=False)
        name = f"memory-{batch.replace(' ', '-')}"
        figures.append(Figure(name, f"Weights and state, {batch}", "", time.x, memory, series))
    return [replace(figure, name=f"{figure.name}-{i}") for i, figure in enumerate(figures)]


DRAWN: dict[str, Callable[..., list[Figure]]] = {
    "figure5": lambda results: [figure for figure in Plots(results).outcomes() if "-over-" in figure.name],
    "table4": lambda results: Plots(results).speed(),
    "figure6": draw_figure6,
}
"""The function that returns the figures of each claim that is drawn, from its results."""


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


def _weights(results: Results) -> dict[str, int]:
    """Return the size of the parameters in bytes (float32), by entry."""
    return {entry.name: 4 * entry.parameters for entry in results.entries}


def _losses(results: Results, entry: str, width: int | None = None) -> dict[int, float]:
    """Return the final validation losses of an entry by seed; with `width`, of the models of that d_model only."""
    runs = [run for run in results.runs if run.entry == entry and width in (None, run.variant.get("model.d_model"))]
    return {run.seed: run.validation_loss for run in runs if run.validation_loss is not None}


def _differences(losses: Mapping[int, float], base: Mapping[int, float]) -> list[float]:
    """Return losses minus those of the same seed in `base`."""
    return [losses[seed] - base[seed] for seed in sorted(losses.keys() & base.keys())]


def _compare_perplexities(
    results: Results, paper: Mapping[str, float], changes: Mapping[str, str] | None = None
) -> list[str]:
    """Return a table that compares measured losses with the paper's perplexities, and a sentence that sums it up.

    Each row has the paper's perplexity, its difference to RetNet's in nats, the measured loss, its differences to
    RetNet's loss by seed, and whether both differences have the same sign.

    Args:
        results: the study; losses are relative to its entry `retnet`.
        paper: the paper's perplexities, by entry.
        changes: a description of the change for each entry, for an additional column.
    """
    base = _losses(results, "retnet")
    rows = []
    verdicts = {}
    for entry in [entry.name for entry in results.entries]:
        losses = _losses(results, entry)
        deltas = [] if entry == "retnet" else _differences(losses, base)
        paper_delta = verdict = ""
        if entry in paper and deltas:
            delta = math.log(paper[entry] / paper["retnet"])
            agrees = [ours * delta > 0 for ours in deltas]
            paper_delta = f"{delta:+.3f}"
            verdict = verdicts[entry] = "same" if all(agrees) else "seeds disagree" if any(agrees) else "opposite"
        ours = f"{mean(losses.values()):.4f}"
        name = [NAMES[entry]] if changes is None else [NAMES[entry], changes[entry]]
        rows.append((*name, paper.get(entry, ""), paper_delta, ours, _signed(deltas), verdict))
    others = [f"{NAMES[entry]} [{verdict}]" for entry, verdict in verdicts.items() if verdict != "same"]
    summary = f"All {len(verdicts)} rows reproduce in direction."
    if others:
        count = len(verdicts) - len(others)
        listed = " and ".join(filter(None, (", ".join(others[:-1]), others[-1])))
        summary = f"{count} of {len(verdicts)} rows reproduce in direction; the others do not: {listed}."
    first = ["model"] if changes is None else ["row", "change"]
    return [*table([*first, "paper", "Δ", "ours", "Δ of each seed", "direction"], rows), "", summary]


def _signed(deltas: list[float]) -> str:
    return ", ".join(f"{delta:+.4f}" for delta in deltas)


def _comparison_heads(quantity: str) -> list[str]:
    """Return the heads of three columns: a quantity of RetNet, of the Transformer, and their ratio."""
    return [f"{quantity}: RetNet:", "Transformer:", "ratio:"]


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


if __name__ == "__main__":
    for file, text in (files() | drawings()).items():
        write_file(text, file)
