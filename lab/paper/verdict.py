"""The paper's figures beside ours, and whether both point in the same direction.

Models and data here are far smaller than the paper's, so only directions can agree: the sign of a difference of losses,
and whether a ratio is above 1. Losses are in nats per token; the paper's perplexities are compared by their logarithms.
A difference of losses has a direction only if its simultaneous 95 % interval excludes 0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..statistics.comparison import Difference, compare_contrasts, compare_scores
from ..study.comparisons import LOSS_FLOOR
from ..study.results import Results

TABLE_5 = {"retnet": 26.05, "rwkv": 30.92, "h3": 29.97, "hyena": 32.08, "linear-transformer": 40.24}
"""In-domain perplexity at 200M parameters."""
TABLE_6 = {
    "retnet": 26.05,
    "no-gate": 27.84,
    "no-group-norm": 27.54,
    "no-decay": 27.86,
    "single-decay": 27.02,
    "small-heads": 27.68,
}
"""In-domain perplexity at 200M parameters."""
TABLE_8 = {"retnet": (13.09, 12.14, 11.98), "transformer": (13.55, 12.56, 12.35)}
"""Perplexity with a quarter, a half and all of a context of 2,048 tokens."""
FIGURE_5 = {"1.3B": (14.8, 14.5), "2.7B": (13.2, 13.4), "6.7B": (12.8, 13.0)}
"""Perplexity of RetNet and of the Transformer, read off the plot (to within 0.1)."""
TABLE_4 = {"speed": (1.08, 1.15), "memory": (1.0, 1.12)}
"""Lowest and highest advantage of RetNet's training over the Transformer's with FlashAttention, as factors."""
FIGURE_6 = {"memory": 3.4, "latency": 15.6, "throughput": 8.4}
"""Advantage of RetNet's decoding over the Transformer's at 8,192 tokens, as factors."""
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
ROUNDING = {"float32": 1e-3, "float64": 1e-10}
"""Largest difference of a token's loss, in nats, that rounding explains, by dtype."""

SAME = "same"
OPPOSITE = "opposite"
NOT_SEPARATED = "not separated"
UNMEASURED = "not measured"
NO_INTERVAL = "one seed, so no interval"


@dataclass(frozen=True)
class Row:
    """A figure of the paper and ours, as text, and whether both point in the same direction."""

    name: str
    paper: str
    ours: str
    direction: str = ""
    """Result of `direction` or `direction_of`; empty if the paper has no such figure."""


@dataclass(frozen=True)
class Verdict:
    """All figures of a claim."""

    heads: Sequence[str]
    """Column heads: name of the quantity, the paper's figure, and ours."""
    rows: Sequence[Row]

    @property
    def summary(self) -> str:
        """The number of rows with the paper's direction, and the other rows, in a sentence."""
        compared = [row for row in self.rows if row.direction]
        others = [f"{row.name} ({row.direction})" for row in compared if row.direction != SAME]
        same = len(compared) - len(others)
        count = f"{same or 'none'} of {len(compared)} rows"
        exceptions = f"{', but not for' if same else ''}: {'; '.join(others)}" if others else ""
        return f"The direction is the paper's in {count}{exceptions}."


def judge(claim: str, values: Any) -> Verdict:
    """Return the verdict on a claim from its values: the `Results` of its study, or what `claims` measured."""
    return JUDGES[claim](values)


def direction(paper: float, ours: Difference | None) -> str:
    """Compare the sign of the paper's difference with that of ours, which has a simultaneous 95 % interval.

    Returns:
        "same" or "opposite" if our interval excludes 0, otherwise "not separated"; "one seed, so no interval" for None.
    """
    if ours is None:
        return NO_INTERVAL
    return NOT_SEPARATED if ours.low <= 0 <= ours.high else direction_of(paper, [ours.mean])


def direction_of(paper: float, ours: Sequence[float]) -> str:
    """Compare the sign of the paper's difference with the signs of several of ours, which have no interval.

    Args:
        paper: the paper's difference.
        ours: our differences, one for each size of the model; NaN for one that was not measured.

    Returns:
        "same", "opposite", "sizes disagree", or "not measured".
    """
    agree = [value * paper > 0 for value in ours if math.isfinite(value)]
    if not agree:
        return UNMEASURED
    return SAME if all(agree) else "sizes disagree" if any(agree) else OPPOSITE


# ---- claims about quality


@dataclass(frozen=True)
class Losses:
    """The losses of an entry of a study, and the paper's perplexity of the same model."""

    entry: str
    perplexity: float | None
    """The paper's perplexity."""
    paper: float | None
    """The paper's difference to RetNet in nats; None for RetNet itself, and where the paper has no figure."""
    loss: float
    """Our loss, mean of the seeds."""
    ours: Difference | None
    """Our difference to RetNet; None for RetNet itself, and with one seed."""

    @property
    def direction(self) -> str:
        """Result of `direction`; empty if the paper has no difference."""
        return "" if self.paper is None else direction(self.paper, self.ours)


def compare_losses(results: Results, perplexities: Mapping[str, float]) -> list[Losses]:
    """Compare all entries of a study with its entry `retnet`, with simultaneous intervals by Dunnett."""
    scores = {entry.name: losses_of(results, entry.name) for entry in results.entries}
    found = compare_scores(scores, subject="retnet", higher_is_better=False, floor=LOSS_FLOOR)
    compared = []
    for entry in scores:
        perplexity = perplexities.get(entry)
        paper = None
        if entry != "retnet" and perplexity is not None:
            paper = math.log(perplexity / perplexities["retnet"])
        loss = found.means.get(entry, math.nan)
        compared.append(Losses(entry, perplexity, paper, loss, found.differences.get(entry)))
    return compared


def losses_of(results: Results, entry: str, variant: Mapping[str, Any] | None = None) -> list[float]:
    """Return the final validation losses of an entry, one for each seed, in one variant or in all."""
    runs = [run for run in results.runs if run.entry == entry and variant in (None, run.variant)]
    return [run.validation_loss for run in runs if run.validation_loss is not None]


def interval(difference: Difference | None) -> str:
    """Format a difference and its interval; empty for None."""
    if difference is None:
        return ""
    return f"{difference.mean:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"


def _judge_losses(results: Results, perplexities: Mapping[str, float]) -> Verdict:
    rows = []
    for one in compare_losses(results, perplexities):
        if one.entry != "retnet":
            paper = "" if one.paper is None else f"{one.perplexity:g} ({one.paper:+.3f})"
            rows.append(Row(NAMES[one.entry], paper, interval(one.ours), one.direction))
    base = f"against RetNet ({perplexities['retnet']:g} in the paper)"
    return Verdict((base, "paper: perplexity (difference, nats)", "here: difference in nats (95 % interval)"), rows)


def sizes_of(results: Results) -> dict[str, tuple[list[float], list[float]]]:
    """Return the losses of RetNet and of the Transformer with each seed, by size of Figure 5 in ascending order.

    A size is the end of an entry's name (`retnet-1.3b`), or the varied d_model.
    """
    sizes: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for run in results.runs:
        size = run.entry.partition("-")[2]
        models = sizes.setdefault(size or str(run.variant["model.d_model"]), [])
        if (run.entry, run.variant) not in models:
            models.append((run.entry, run.variant))
    losses = {}
    for size, models in sizes.items():
        by_kind = {entry.partition("-")[0]: losses_of(results, entry, variant) for entry, variant in models}
        losses[size] = by_kind.get("retnet", []), by_kind.get("transformer", [])
    return losses


CHANGE = "change from the smallest to the largest size"


def compare_sizes(results: Results) -> dict[str, Difference]:
    """Return RetNet's loss minus the Transformer's for each size that has both, and `CHANGE`.

    The intervals of all of these are simultaneous, by Bonferroni's correction, from one model of all sizes' losses.
    """
    sizes = {size: losses for size, losses in sizes_of(results).items() if all(losses)}
    scores = {}
    for size, (retnet, transformer) in sizes.items():
        scores |= {f"retnet {size}": retnet, f"transformer {size}": transformer}
    contrasts = {size: {f"retnet {size}": 1.0, f"transformer {size}": -1.0} for size in sizes}
    if len(sizes) > 1:
        smallest, *_, largest = contrasts.values()
        contrasts[CHANGE] = largest | {name: -weight for name, weight in smallest.items()}
    return compare_contrasts(scores, contrasts, higher_is_better=False, floor=LOSS_FLOOR)


def _judge_figure5(results: Results) -> Verdict:
    paper = {size: math.log(retnet / transformer) for size, (retnet, transformer) in FIGURE_5.items()}
    smallest, *_, largest = paper
    ours = compare_sizes(results)
    sizes = list(sizes_of(results))
    claims = [
        ("difference at the smallest size", paper[smallest], f" ({smallest})", sizes[0]),
        ("difference at the largest size", paper[largest], f" ({largest})", sizes[-1]),
        (CHANGE, paper[largest] - paper[smallest], "", CHANGE),
    ]
    rows = []
    for name, figure, where, key in claims:
        difference = ours.get(key)
        rows.append(Row(name, f"{figure:+.3f}{where}", interval(difference), direction(figure, difference)))
    heads = ("RetNet - Transformer", "paper, read off its plot: nats", "here: nats (95 % interval)")
    return Verdict(heads, rows)


def _judge_table8(values: Mapping[str, Any]) -> Verdict:
    by_kind: dict[str, list[Sequence[float]]] = {kind: [] for kind in TABLE_8}
    for model in values["models"]:
        by_kind[model["entry"].partition("-")[0]].append(model["losses"])
    rows = []
    for kind, figures in TABLE_8.items():
        paper = math.log(figures[-1] / figures[0])
        ours = [losses[-1] - losses[0] for losses in by_kind[kind]]
        name = f"{NAMES[kind]}: from a quarter to all of the context"
        rows.append(Row(name, f"{paper:+.3f}", _signed(ours), direction_of(paper, ours)))
    paper = math.log(TABLE_8["retnet"][-1] / TABLE_8["transformer"][-1])
    ours = [one[-1] - other[-1] for one, other in zip(by_kind["retnet"], by_kind["transformer"], strict=True)]
    name = "RetNet - Transformer, with all of the context"
    rows.append(Row(name, f"{paper:+.3f}", _signed(ours), direction_of(paper, ours)))
    return Verdict(("change of the loss", "paper: nats", "here: nats, each size, without an interval"), rows)


def _signed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.4f}" for value in values)


def _judge_paradigms(values: Mapping[str, Any]) -> Verdict:
    largest: dict[str, float] = {}
    for row in values["rows"]:
        largest[row["dtype"]] = max(largest.get(row["dtype"], 0.0), row["difference"])
    rows = []
    for dtype, difference in largest.items():
        verdict = SAME if difference <= ROUNDING[dtype] else OPPOSITE
        rows.append(Row(f"in {dtype}", f"0, up to rounding ({ROUNDING[dtype]:g})", f"{difference:.1e}", verdict))
    head = "largest difference of a token's loss between paradigms"
    return Verdict((head, "paper: nats", "here: nats"), rows)


# ---- claims about speed and memory


def weights_of(results: Results) -> dict[str, int]:
    """Return the size of the parameters in bytes (float32), by entry."""
    return {entry.name: 4 * entry.parameters for entry in results.entries}


def _judge_table4(results: Results) -> Verdict:
    length = max(row.length for row in results.speed.train)
    timed = {row.entry: row for row in results.speed.train if row.length == length}
    retnet, transformer = timed["retnet"], timed["transformer"]
    ours = {
        "speed": _ratio(retnet.tokens_per_second, transformer.tokens_per_second),
        "memory": _ratio(transformer.memory_bytes, retnet.memory_bytes),
    }
    words = {"speed": "times the speed", "memory": "times less memory"}
    rows = []
    for name, (low, high) in TABLE_4.items():
        verdict = direction_of(math.log(high), [math.log(ours[name])])
        rows.append(Row(words[name], f"{low:.2f} to {high:.2f}", _factor(ours[name]), verdict))
    return Verdict(("RetNet's advantage in training", "paper: 8,192 tokens", f"here: {length:,} tokens"), rows)


def _judge_figure6(results: Results) -> Verdict:
    context = max(row.context for row in results.speed.decode)
    timed = {row.entry: row for row in results.speed.decode if row.context == context}
    retnet, transformer = timed["retnet"], timed["transformer"]
    weights = weights_of(results)
    memory = [weights[row.entry] + (row.state_bytes or 0) for row in (transformer, retnet)]
    time = _ratio(transformer.seconds, retnet.seconds)
    ours = {"memory": _ratio(*memory), "latency": time, "throughput": time}
    words = {"memory": "times less memory", "latency": "times less latency", "throughput": "times the throughput"}
    rows = []
    for name, factor in FIGURE_6.items():
        verdict = direction_of(math.log(factor), [math.log(ours[name])])
        rows.append(Row(words[name], f"{factor:.1f}", _factor(ours[name]), verdict))
    return Verdict(("RetNet's advantage in decoding", "paper: 8,192 tokens", f"here: {context:,} tokens"), rows)


def _ratio(one: float | None, other: float | None) -> float:
    """Return a ratio; NaN if one of the values was not measured."""
    return one / other if one and other else math.nan


def _factor(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else UNMEASURED


JUDGES: dict[str, Callable[[Any], Verdict]] = {
    "table5": lambda results: _judge_losses(results, TABLE_5),
    "table6": lambda results: _judge_losses(results, TABLE_6),
    "figure5": _judge_figure5,
    "table8": _judge_table8,
    "paradigms": _judge_paradigms,
    "table4": _judge_table4,
    "figure6": _judge_figure6,
    "figure6-batch8": _judge_figure6,
}
"""The function that returns the verdict on each claim, from its values."""
