"""Write the tables, verdicts and pictures of docs/paper.md from what was measured: `python docs/paper.py`.

What was measured is in experiments/retnet_paper/results, one file a claim, which `seqmix paper
CLAIM` writes. The paper's figures stand here; those it only draws were read off its
plots by others, and are given as such.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from seqmix.experiments import svg
from seqmix.experiments.chart import Axis, Chart, Line
from seqmix.experiments.markup import xml
from seqmix.experiments.pages import fill, table
from seqmix.experiments.plots import Plots
from seqmix.experiments.results import Results, read_results
from seqmix.experiments.retnet_paper.claims import KEPT, OF_RUNS

TARGET = Path(__file__).with_name("paper.md")
PICTURES = Path(__file__).with_name("paper")
BATCHES = {1: "one sequence", 8: "eight sequences"}
"""Of Figure 6."""

TABLE_5 = {"retnet": 26.05, "linear-transformer": 40.24, "hyena": 32.08}
TABLE_6 = {
    "retnet": 26.05,
    "no-gate": 27.84,
    "no-group-norm": 27.54,
    "no-decay": 27.86,
    "single-decay": 27.02,
    "small-heads": 27.68,
}
"""In-domain perplexity, 200M parameters."""
TABLE_8 = {"transformer": (13.55, 12.56, 12.35), "retnet": (13.09, 12.14, 11.98)}
"""Perplexity after a quarter, a half and the whole of 2,048 tokens."""
FIGURE_5 = {"1.3B": (14.8, 14.5), "2.7B": (13.2, 13.4), "6.7B": (12.8, 13.0)}
"""Perplexity of RetNet and of the Transformer, read off the plot (within 0.1)."""
EXACT = {"float32": 1e-3, "float64": 1e-10}
"""What rounding may make of equal losses."""
BESIDE = ["paper", "Δ", "ours", "Δ of each seed", "direction"]
"""Heads of what `_beside` gives."""
CHANGES = {
    "retnet": "",
    "no-gate": "`gate: none`, `expand_v: 1.0`, `ffn.expansion: 4.0`",
    "no-group-norm": "`head_norm: none`",
    "no-decay": "`decay: none`",
    "single-decay": "`decay: constant`, `gamma: 0.9921875`",
    "small-heads": "`n_heads: 16`",
}
NAMES = {
    "retnet": "RetNet",
    "no-gate": "no swish gate",
    "no-group-norm": "no GroupNorm",
    "no-decay": "no decay (gamma = 1)",
    "single-decay": "one decay for all heads",
    "small-heads": "head dimension, a quarter",
    "linear-transformer": "Linear Transformer",
    "hyena": "Hyena",
    "transformer": "Transformer (xPos)",
    "gla": "GLA",
    "gated-delta-net": "Gated DeltaNet",
}
"""Entries as the paper calls them."""


def render(page: str, kept: Path = KEPT) -> str:
    """The page with its tables."""
    for claim in PARTS:
        page = fill(page, claim, part(claim, kept))
    return page


def part(claim: str, kept: Path) -> list[str]:
    """The lines of a claim; of one that was not measured, how to measure it."""
    write, names = PARTS[claim]
    if (found := _read(kept, names)) is None:
        return [f"Not measured yet: `seqmix paper {' '.join(names)}`."]
    return write(*found)


def pictures(kept: Path = KEPT) -> dict[Path, str]:
    """The drawing of each claim that the paper draws, by file; of those that were measured."""
    drawn = {"figure5": _drawn_figure5, "table4": _drawn_table4, "figure6": _drawn_figure6}
    found = {claim: draw(*results) for claim, draw in drawn.items() if (results := _read(kept, PARTS[claim][1]))}
    return {
        PICTURES / f"{claim}.svg": xml(svg.document([_named(chart) for chart in charts], 2))
        for claim, charts in found.items()
    }


# ---- what is learned


def table6(results: Results) -> list[str]:
    """The ablations."""
    rows, verdicts = [], {}
    for entry, theirs in TABLE_6.items():
        cells, verdicts[entry] = _beside(results, entry, theirs, TABLE_6["retnet"])
        rows.append((NAMES[entry], CHANGES[entry], *cells))
    return [*table(["row", "change", *BESIDE], rows), "", _counted(verdicts)]


def table5(results: Results) -> list[str]:
    """Other mixers: those of the paper, and ours."""
    rows, verdicts = [], {}
    for entry in [entry.name for entry in results.entries]:
        cells, verdict = _beside(results, entry, TABLE_5.get(entry), TABLE_5["retnet"])
        rows.append((NAMES[entry], *cells))
        if entry in TABLE_5:
            verdicts[entry] = verdict
    better = [NAMES[e.name] for e in results.entries if e.name not in TABLE_5 and max(_deltas(results, e.name)) < 0]
    return [
        *table(["model", *BESIDE], rows),
        "",
        f"{_counted(verdicts)} Of the rows without a figure of the paper, {_and(better) or 'none'} learned "
        f"more than RetNet with every seed.",
    ]


def figure5(results: Results) -> list[str]:
    """The Transformer beside RetNet over the size."""
    drawn = [(size, ours, theirs, f"{math.log(ours / theirs):+.3f}") for size, (ours, theirs) in FIGURE_5.items()]
    rows, gaps = [], []
    for width in dict.fromkeys(run.variant["model.d_model"] for run in results.runs):
        losses = {entry: _losses(results, entry, width) for entry in ("retnet", "transformer")}
        gaps.append(_differences(losses["retnet"], losses["transformer"]))
        means = [f"{mean(found.values()):.4f}" for found in losses.values()]
        rows.append((width, *means, ", ".join(f"{gap:+.4f}" for gap in gaps[-1])))
    every = [gap for found in gaps for gap in found]
    ahead = "at every size" if max(every) < 0 else "at no size" if min(every) > 0 else "at some sizes, or by some seeds"
    grows = [last < first for first, last in zip(gaps[0], gaps[-1], strict=False)]
    trend = (
        "so does what it gains on the Transformer grow from the smallest to the largest, the paper's direction"
        if all(grows)
        else "what it gains on the Transformer does not grow from the smallest to the largest, as the paper has it"
        if not any(grows)
        else "the seeds disagree on whether what it gains on the Transformer grows with the size, as the paper has it"
    )
    heads = ["RetNet:", "Transformer:"]
    return [
        *table(["paper, read off its plot", *heads, "RetNet - Transformer, nats:"], drawn),
        "",
        *table(["ours, `d_model`", *heads, "RetNet - Transformer, each seed:"], rows),
        "",
        f"RetNet has the lower loss {ahead}; {trend}.",
        "",
        _picture("figure5", "loss over the size"),
    ]


def table8(values: dict[str, Any]) -> list[str]:
    """What context brings."""
    rows = []
    for entry, figures in TABLE_8.items():
        rows.append((f"paper, {NAMES[entry]}: perplexity", *figures, f"{math.log(figures[2] / figures[0]):+.3f}"))
    found = {(model["entry"], model["d_model"]): model["losses"] for model in values["models"]}
    for (entry, width), losses in found.items():
        cells = [f"{loss:.4f}" for loss in losses]
        rows.append((f"ours, {NAMES[entry]}, `d_model` {width}: nats", *cells, f"{losses[-1] - losses[0]:+.4f}"))
    gains = all(losses[0] > losses[1] > losses[2] for losses in found.values())
    widths = list(dict.fromkeys(width for _, width in found))
    ahead = [w for w in widths if all(a < b for a, b in zip(found["retnet", w], found["transformer", w], strict=True))]
    lower = "at every size" if ahead == widths else f"at widths of {_and(map(str, ahead))}" if ahead else "at no size"
    return [
        *table(["", "a quarter:", "a half:", "the whole:", "from a quarter to the whole, nats:"], rows),
        "",
        f"Contexts are {_and(map(str, values['contexts']))} tokens, of which the last {values['scored']} are scored. "
        f"{'Every' if gains else 'Not every'} model gains from more context, and RetNet is ahead of the Transformer at "
        f"all three {lower}.",
    ]


def paradigms(values: dict[str, Any]) -> list[str]:
    """One function by three algorithms."""
    rows = [
        (
            NAMES[row["entry"]],
            row["dtype"],
            f"{row['length']:,}",
            ", ".join(f"{name} {loss:.6f}" for name, loss in row["losses"].items()),
            f"{row['difference']:.1e}",
        )
        for row in values["rows"]
    ]
    heads = ["model", "numbers", "tokens of a sequence:", "nats a token, by each", "largest difference of a token:"]
    largest = {kind: max(row["difference"] for row in values["rows"] if row["dtype"] == kind) for kind in EXACT}
    same = all(largest[kind] < bound for kind, bound in EXACT.items())
    says = "They are one function" if same else "They are not one function"
    each = " and ".join(f"{difference:.1e} nats in {kind}" for kind, difference in largest.items())
    return [*table(heads, rows), "", f"{says}: no token's loss differs by more than {each}."]


# ---- what is timed


def table4(results: Results) -> list[str]:
    """Training over the length."""
    timed = {(row.entry, row.length): row for row in results.speed.train}
    rows, ratio = [], math.nan
    for length in dict.fromkeys(row.length for row in results.speed.train):
        ours, theirs = timed["retnet", length], timed["transformer", length]
        ratio = _ratio(ours.tokens_per_second, theirs.tokens_per_second)
        speeds = [f"{row.tokens_per_second:,.0f}" for row in (ours, theirs)]
        memory = [_mib(ours.memory_bytes), _mib(theirs.memory_bytes)]
        saved = _ratio(theirs.memory_bytes, ours.memory_bytes)
        rows.append((f"{length:,}", *speeds, f"{ratio:.2f}", *memory, f"{saved:.2f}"))
    says = "The direction reproduces" if ratio > 1 else "The direction does not reproduce"
    return [
        *table(["tokens of a sequence", *_three("tokens/s"), *_three("memory of a step")], rows),
        "",
        f"{says}: at the longest, RetNet trains at {ratio:.2f} times the Transformer's speed.",
        "",
        _picture("table4", "training speed and memory over the length"),
    ]


def figure6(*found: Results) -> list[str]:
    """Decoding over the context, with one sequence and with eight."""
    rows, last = [], {}
    for batch, results in zip(BATCHES, found, strict=True):
        weights = _weights(results)
        timed = {(row.entry, row.context): row for row in results.speed.decode}
        for context in dict.fromkeys(row.context for row in results.speed.decode):
            ours, theirs = timed["retnet", context], timed["transformer", context]
            memory = [weights[row.entry] + (row.state_bytes or 0) for row in (ours, theirs)]
            time, size = _ratio(theirs.seconds, ours.seconds), memory[1] / memory[0]
            times = [f"{1e3 * (row.seconds or math.nan):.2f}" for row in (ours, theirs)]
            rows.append((batch, f"{context:,}", *times, f"{time:.1f}", *map(_mib, memory), f"{size:.1f}"))
            last[batch] = context, time, size
    context, time, size = last[8]
    all_above = min(value for _, *both in last.values() for value in both) > 1
    return [
        *table(["sequences", "context:", *_three("ms a token"), *_three("weights and state")], rows),
        "",
        f"{'All' if all_above else 'Not all'} reproduce in direction. At {context:,} tokens and eight sequences: "
        f"{size:.1f} times less memory (paper: 3.4), {time:.1f} times the throughput and as much less latency (paper: "
        f"8.4 and 15.6); with one sequence: {last[1][2]:.1f} and {last[1][1]:.1f}.",
        "",
        _picture("figure6", "time of a token, and weights with state, over the context"),
    ]


PARTS: dict[str, tuple[Callable[..., list[str]], tuple[str, ...]]] = {
    "table5": (table5, ("table5",)),
    "table6": (table6, ("table6",)),
    "figure5": (figure5, ("figure5",)),
    "table8": (table8, ("table8",)),
    "paradigms": (paradigms, ("paradigms",)),
    "table4": (table4, ("table4",)),
    "figure6": (figure6, ("figure6", "figure6-batch8")),
}
"""What writes each region of the page, and the claims whose results it needs."""


# ---- pictures


def _drawn_figure5(results: Results) -> list[Chart]:
    return [chart for chart in Plots(results).outcomes() if " over " in chart.title]


def _drawn_table4(results: Results) -> list[Chart]:
    return Plots(results).speed()


def _drawn_figure6(*found: Results) -> list[Chart]:
    """Time, and weights with state, for one sequence and for eight."""
    charts = []
    for batch, results in zip(BATCHES.values(), found, strict=True):
        time = next(chart for chart in Plots(results).speed() if chart.title == "Time of one token")
        charts.append(replace(time, title=f"{time.title}, {batch}"))
        lines = []
        for style, (entry, weights) in enumerate(_weights(results).items()):
            rows = [row for row in results.speed.decode if row.entry == entry]
            sizes = [weights + (row.state_bytes or 0) for row in rows]
            lines.append(Line(entry, [row.context for row in rows], sizes, style=style))
        memory = Axis("memory", unit="bytes", zero=True, log=False)
        charts.append(Chart(f"Weights and state, {batch}", "", time.x, memory, lines))
    return charts


def _named(chart: Chart) -> Chart:
    """With the paper's names."""
    return replace(chart, lines=[replace(line, name=NAMES[line.name]) for line in chart.lines])


def _picture(claim: str, shown: str) -> str:
    return f"![{claim.capitalize()}: {shown}]({PICTURES.name}/{claim}.svg)"


# ---- figures


def _read(kept: Path, names: Iterable[str]) -> list[Any] | None:
    """What was measured for claims; None unless it is there for all of them."""
    files = {name: kept / f"{name}.json" for name in names}
    if not all(file.is_file() for file in files.values()):
        return None
    return [
        json.loads(file.read_text(encoding="utf-8")) if name in OF_RUNS else read_results(file)
        for name, file in files.items()
    ]


def _weights(results: Results) -> dict[str, int]:
    """Bytes of parameters, by entry."""
    return {entry.name: 4 * entry.parameters for entry in results.entries}


def _losses(results: Results, entry: str, width: int | None = None) -> dict[int, float]:
    """Final validation losses, by seed."""
    runs = [run for run in results.runs if run.entry == entry and run.validation_loss is not None]
    wanted = [run for run in runs if width is None or run.variant.get("model.d_model") == width]
    return {run.seed: run.validation_loss for run in wanted if run.validation_loss is not None}


def _differences(losses: Mapping[int, float], base: Mapping[int, float]) -> list[float]:
    """Losses above others of the same seed."""
    return [losses[seed] - base[seed] for seed in sorted(losses.keys() & base.keys())]


def _deltas(results: Results, entry: str) -> list[float]:
    """The losses above RetNet's of the same seed."""
    return _differences(_losses(results, entry), _losses(results, "retnet"))


def _beside(results: Results, entry: str, theirs: float | None, base: float) -> tuple[list[str], str]:
    """The paper's perplexity and what it is above RetNet's in nats, ours, and whether they point the same way."""
    ours = f"{mean(_losses(results, entry).values()):.4f}"
    if entry == "retnet":
        return [f"{theirs}", "", ours, "", ""], ""
    deltas = _deltas(results, entry)
    each = ", ".join(f"{delta:+.4f}" for delta in deltas)
    if theirs is None:
        return ["", "", ours, each, ""], ""
    wanted = math.log(theirs / base)
    same = [delta * wanted > 0 for delta in deltas]
    verdict = "same" if all(same) else "opposite" if not any(same) else "seeds disagree"
    return [f"{theirs}", f"{wanted:+.3f}", ours, each, verdict], verdict


def _counted(verdicts: Mapping[str, str]) -> str:
    """How many of the paper's rows point the same way, and which do not."""
    rows = {name: verdict for name, verdict in verdicts.items() if verdict}
    same = [name for name, verdict in rows.items() if verdict == "same"]
    if len(same) == len(rows):
        return f"All {len(rows)} rows reproduce in direction."
    others = [f"{NAMES[name]} [{verdict}]" for name, verdict in rows.items() if verdict != "same"]
    return f"{len(same)} of {len(rows)} rows reproduce in direction; the others do not: {_and(others)}."


def _ratio(one: float | None, other: float | None) -> float:
    return math.nan if one is None or not other else one / other


def _three(what: str) -> list[str]:
    """Heads of RetNet's figure, the Transformer's and their ratio."""
    return [f"{what}: RetNet:", "Transformer:", "ratio:"]


def _mib(size: float | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f} MiB"


def _and(items: Any) -> str:
    *first, last = [*items] or [""]
    return f"{', '.join(first)} and {last}" if first else last


if __name__ == "__main__":
    TARGET.write_text(render(TARGET.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    for file, drawing in pictures().items():
        file.write_text(drawing, encoding="utf-8")
