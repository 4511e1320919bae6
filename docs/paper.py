"""Write the tables, verdicts and pictures of docs/paper.md from what was measured: `python docs/paper.py`.

What was measured is in experiments/retnet_paper/results, one file a claim, which `python -m
seqmix.experiments.retnet_paper CLAIM` writes. The paper's figures stand here; those it only draws were read off its
plots by others, and are given as such.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from seqmix.experiments import svg
from seqmix.experiments.chart import Axis, Chart, Line
from seqmix.experiments.markup import xml
from seqmix.experiments.pages import fill
from seqmix.experiments.plots import Plots
from seqmix.experiments.results import Results, read_results
from seqmix.experiments.retnet_paper.claims import KEPT

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
"""Perplexity behind a quarter, a half and the whole of 2,048 tokens."""
FIGURE_5 = {"1.3B": (14.8, 14.5), "2.7B": (13.2, 13.4), "6.7B": (12.8, 13.0)}
"""Perplexity of RetNet and of the Transformer, read off the plot (within 0.1)."""
EXACT = {"float32": 1e-3, "float64": 1e-10}
"""What rounding may make of equal losses."""
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
    for claim, write in PARTS.items():
        page = fill(page, claim, write(kept))
    return page


def pictures(kept: Path = KEPT) -> dict[Path, str]:
    """The drawing of each claim that the paper draws, by file; of those that were measured."""
    drawn = {"figure5": _drawn_figure5(kept), "table4": _drawn_table4(kept), "figure6": _drawn_figure6(kept)}
    return {
        PICTURES / f"{claim}.svg": xml(svg.document([_named(chart) for chart in charts], 2))
        for claim, charts in drawn.items()
        if charts
    }


# ---- what is learned


def table6(kept: Path) -> list[str]:
    """The ablations."""
    if (results := _results(kept, "table6")) is None:
        return _missing("table6")
    lines, verdicts = ["| row | change | paper | Δ | ours | Δ of each seed | direction |", "|---" * 7 + "|"], {}
    for entry, theirs in TABLE_6.items():
        cells, verdicts[entry] = _beside(results, entry, theirs, TABLE_6["retnet"])
        lines.append(f"| {NAMES[entry]} | {CHANGES[entry]} | {' | '.join(cells)} |")
    return [*lines, "", _counted(verdicts)]


def table5(kept: Path) -> list[str]:
    """Other mixers: those of the paper, and ours."""
    if (results := _results(kept, "table5")) is None:
        return _missing("table5")
    lines, verdicts = ["| model | paper | Δ | ours | Δ of each seed | direction |", "|---" * 6 + "|"], {}
    for entry in [entry.name for entry in results.entries]:
        cells, verdict = _beside(results, entry, TABLE_5.get(entry), TABLE_5["retnet"])
        lines.append(f"| {NAMES[entry]} | {' | '.join(cells)} |")
        if entry in TABLE_5:
            verdicts[entry] = verdict
    better = [NAMES[e.name] for e in results.entries if e.name not in TABLE_5 and max(_deltas(results, e.name)) < 0]
    return [
        *lines,
        "",
        f"{_counted(verdicts)} Of the rows without a figure of the paper, {_and(better) or 'none'} learned "
        f"more than RetNet with every seed.",
    ]


def figure5(kept: Path) -> list[str]:
    """The Transformer beside RetNet over the size."""
    if (results := _results(kept, "figure5")) is None:
        return _missing("figure5")
    lines = ["| paper, read off its plot | RetNet | Transformer | RetNet - Transformer, nats |", "|---|---:|---:|---:|"]
    for size, (ours, theirs) in FIGURE_5.items():
        lines.append(f"| {size} | {ours} | {theirs} | {math.log(ours / theirs):+.3f} |")
    lines += [
        "",
        "| ours, `d_model` | RetNet | Transformer | RetNet - Transformer, each seed |",
        "|---|---:|---:|---:|",
    ]
    gaps = []
    for width in dict.fromkeys(run.variant["model.d_model"] for run in results.runs):
        losses = {entry: _losses(results, entry, width) for entry in ("retnet", "transformer")}
        differences = _differences(losses["retnet"], losses["transformer"])
        gaps.append(differences)
        cells = [f"{mean(found.values()):.4f}" for found in losses.values()]
        lines.append(f"| {width} | {' | '.join(cells)} | {', '.join(f'{d:+.4f}' for d in differences)} |")
    every = [difference for found in gaps for difference in found]
    ahead = "at every size" if max(every) < 0 else "at no size" if min(every) > 0 else "at some sizes, or by some seeds"
    grows = [last < first for first, last in zip(gaps[0], gaps[-1], strict=False)]
    trend = (
        "so does what it gains on the Transformer grow from the smallest to the largest, the paper's direction"
        if all(grows)
        else "what it gains on the Transformer does not grow from the smallest to the largest, as the paper has it"
        if not any(grows)
        else "the seeds disagree on whether what it gains on the Transformer grows with the size, as the paper has it"
    )
    return [*lines, "", f"RetNet has the lower loss {ahead}; {trend}.", "", _picture("figure5", "loss over the size")]


def table8(kept: Path) -> list[str]:
    """What context brings."""
    if (values := _read(kept, "table8")) is None:
        return _missing("table8")
    contexts = values["contexts"]
    head = "| | a quarter | a half | the whole | from a quarter to the whole, nats |"
    lines = [head, "|---|---:|---:|---:|---:|"]
    for entry, figures in TABLE_8.items():
        gain = math.log(figures[2] / figures[0])
        lines.append(f"| paper, {NAMES[entry]}: perplexity | {' | '.join(map(str, figures))} | {gain:+.3f} |")
    found = {(model["entry"], model["d_model"]): model["losses"] for model in values["models"]}
    for (entry, width), losses in found.items():
        cells = " | ".join(f"{loss:.4f}" for loss in losses)
        lines.append(f"| ours, {NAMES[entry]}, `d_model` {width}: nats | {cells} | {losses[-1] - losses[0]:+.4f} |")
    gains = all(losses[0] > losses[1] > losses[2] for losses in found.values())
    widths = list(dict.fromkeys(width for _, width in found))
    ahead = [w for w in widths if all(a < b for a, b in zip(found["retnet", w], found["transformer", w], strict=True))]
    lower = "at every size" if ahead == widths else f"at widths of {_and(map(str, ahead))}" if ahead else "at no size"
    return [
        *lines,
        "",
        f"Contexts are {_and(map(str, contexts))} tokens, of which the last {values['scored']} are scored. "
        f"{'Every' if gains else 'Not every'} model gains from more context, and RetNet is ahead of the Transformer at "
        f"all three {lower}.",
    ]


def paradigms(kept: Path) -> list[str]:
    """One function by three algorithms."""
    if (values := _read(kept, "paradigms")) is None:
        return _missing("paradigms")
    lines = ["| model | numbers | tokens of a sequence | nats a token, by each | largest difference of a token |"]
    lines.append("|---|---|---:|---|---:|")
    for row in values["rows"]:
        losses = ", ".join(f"{name} {loss:.6f}" for name, loss in row["losses"].items())
        name = NAMES[row["entry"]]
        lines.append(f"| {name} | {row['dtype']} | {row['length']:,} | {losses} | {row['difference']:.1e} |")
    largest = {kind: max(row["difference"] for row in values["rows"] if row["dtype"] == kind) for kind in EXACT}
    same = all(largest[kind] < bound for kind, bound in EXACT.items())
    says = "They are one function" if same else "They are not one function"
    told = " and ".join(f"{difference:.1e} nats in {kind}" for kind, difference in largest.items())
    return [*lines, "", f"{says}: no token's loss differs by more than {told}."]


# ---- what is timed


def table4(kept: Path) -> list[str]:
    """Training over the length."""
    results = _results(kept, "table4")
    if results is None or not results.speed.train:
        return _missing("table4")
    rows = {(row.entry, row.length): row for row in results.speed.train}
    head = f"| tokens of a sequence | {_pair('tokens/s')} | {_pair('memory of a step')} |"
    lines, ratio = [head, "|---" + "|---:" * 6 + "|"], math.nan
    for length in dict.fromkeys(row.length for row in results.speed.train):
        ours, theirs = rows["retnet", length], rows["transformer", length]
        ratio = _ratio(ours.tokens_per_second, theirs.tokens_per_second)
        memory = _ratio(theirs.memory_bytes, ours.memory_bytes)
        cells = [f"{ours.tokens_per_second:,.0f}", f"{theirs.tokens_per_second:,.0f}", f"{ratio:.2f}"]
        cells += [_mib(ours.memory_bytes), _mib(theirs.memory_bytes), f"{memory:.2f}"]
        lines.append(f"| {length:,} | {' | '.join(cells)} |")
    says = "The direction reproduces" if ratio > 1 else "The direction does not reproduce"
    told = f"{says}: at the longest, RetNet trains at {ratio:.2f} times the Transformer's speed."
    return [*lines, "", told, "", _picture("table4", "training speed and memory over the length")]


def figure6(kept: Path) -> list[str]:
    """Decoding over the context, with one sequence and with eight."""
    if (found := _decoding(kept)) is None:
        return _missing("figure6 figure6-batch8")
    head = f"| sequences | context | {_pair('ms a token')} | {_pair('weights and state')} |"
    lines, last = [head, "|---|---:" + "|---:" * 6 + "|"], {}
    for batch, results in found.items():
        weights = _weights(results)
        rows = {(row.entry, row.context): row for row in results.speed.decode}
        for context in dict.fromkeys(row.context for row in results.speed.decode):
            ours, theirs = rows["retnet", context], rows["transformer", context]
            memory = [weights[row.entry] + (row.state_bytes or 0) for row in (ours, theirs)]
            time, size = _ratio(theirs.seconds, ours.seconds), memory[1] / memory[0]
            cells = [f"{1e3 * (row.seconds or math.nan):.2f}" for row in (ours, theirs)]
            cells += [f"{time:.1f}", *map(_mib, memory), f"{size:.1f}"]
            lines.append(f"| {batch} | {context:,} | {' | '.join(cells)} |")
            last[batch] = context, time, size
    context, time, size = last[8]
    says = (
        "All reproduce in direction"
        if min(value for _, *both in last.values() for value in both) > 1
        else ("Not all reproduce in direction")
    )
    return [
        *lines,
        "",
        f"{says}. At {context:,} tokens and eight sequences: {size:.1f} times less memory (paper: 3.4), {time:.1f} "
        f"times the throughput and as much less latency (paper: 8.4 and 15.6); with one sequence: {last[1][2]:.1f} "
        f"and {last[1][1]:.1f}.",
        "",
        _picture("figure6", "time of a token, and weights with state, over the context"),
    ]


PARTS = {
    "table5": table5,
    "table6": table6,
    "figure5": figure5,
    "table8": table8,
    "paradigms": paradigms,
    "table4": table4,
    "figure6": figure6,
}
"""What writes each region of the page."""


# ---- pictures


def _drawn_figure5(kept: Path) -> list[Chart]:
    results = _results(kept, "figure5")
    return [] if results is None else [chart for chart in Plots(results).outcomes() if " over " in chart.title]


def _drawn_table4(kept: Path) -> list[Chart]:
    results = _results(kept, "table4")
    return [] if results is None else Plots(results).speed()


def _drawn_figure6(kept: Path) -> list[Chart]:
    """Time, and weights with state, for one sequence and for eight."""
    charts = []
    for batch, results in (_decoding(kept) or {}).items():
        time = next(chart for chart in Plots(results).speed() if chart.title == "Time of one token")
        charts.append(replace(time, title=f"{time.title}, {BATCHES[batch]}"))
        lines = []
        for style, (entry, weights) in enumerate(_weights(results).items()):
            rows = [row for row in results.speed.decode if row.entry == entry]
            sizes = [weights + (row.state_bytes or 0) for row in rows]
            lines.append(Line(entry, [row.context for row in rows], sizes, style=style))
        memory = Axis("memory", unit="bytes", zero=True, log=False)
        charts.append(Chart(f"Weights and state, {BATCHES[batch]}", "", time.x, memory, lines))
    return charts


def _named(chart: Chart) -> Chart:
    """With the paper's names."""
    return replace(chart, lines=[replace(line, name=NAMES[line.name]) for line in chart.lines])


def _picture(claim: str, shown: str) -> str:
    return f"![{claim.capitalize()}: {shown}]({PICTURES.name}/{claim}.svg)"


# ---- figures


def _decoding(kept: Path) -> dict[int, Results] | None:
    """Figure 6, by the sequences at once; None unless all of it was measured."""
    found = {}
    for batch, name in ((1, "figure6"), (8, "figure6-batch8")):
        results = _results(kept, name)
        if results is None or not results.speed.decode:
            return None
        found[batch] = results
    return found


def _weights(results: Results) -> dict[str, int]:
    """Bytes of parameters, by entry."""
    return {entry.name: 4 * entry.parameters for entry in results.entries}


def _results(kept: Path, claim: str) -> Results | None:
    return read_results(kept / f"{claim}.json") if (kept / f"{claim}.json").is_file() else None


def _read(kept: Path, claim: str) -> dict[str, Any] | None:
    file = kept / f"{claim}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _missing(claims: str) -> list[str]:
    return [f"Not measured yet: `python -m seqmix.experiments.retnet_paper {claims}`."]


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


def _pair(what: str) -> str:
    """Heads of RetNet's figure, the Transformer's and their ratio."""
    return f"{what}: RetNet | Transformer | ratio"


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
