"""Write the results of docs/explanation/language.md: `python research/language.py [FOLDER...]`.

FOLDER is that of a study (`seqmix compare language`, language-slow or language-5m), finished or not: its finished runs
are added to docs/explanation/language.json. Without a folder, the page is written anew from that file.
"""

import math
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from seqmix.lab.figures.figure import Axis, Figure, Point, Series, drawable
from seqmix.lab.figures.writer import adaptive
from seqmix.lab.markdown import fill, table
from seqmix.lab.statistics.comparison import Difference, Verdict, compare_scores
from seqmix.lab.study.columns import rank_text
from seqmix.lab.study.comparisons import LOSS_FLOOR
from seqmix.lab.study.results_file import read_results
from seqmix.lab.units import plus_minus, quantity
from seqmix.registry import SeqmixError, write_file
from seqmix.research import DOCS
from seqmix.research.language_results import REFERENCE, Measured, Size, add, losses_after, read_measured

TARGET = DOCS / "explanation" / "language.md"
RESULTS = TARGET.with_suffix(".json")
PICTURES = TARGET.with_suffix("")
LENGTHS = 360, 120
"""Steps of the runs with equal tokens; the first orders the table."""
TIME = 240
"""Steps of attention that take the time that all mixers get."""
TOKENS = 8 * 256
"""Tokens of a step."""
CONTEXTS = "256", "4096"
"""Contexts of the costs; figures show those of the last."""
FLOOR = 0.5
"""Loss in nats per byte that a second reading at equal time supposes power laws to approach."""
UNMEASURED = "It is to be measured."
LOSS = Axis("bits per byte", log=False)
MARGIN = 0.05
"""Difference in bits per byte up to which two mixers count as equivalent."""
INTERVALS = "Mean and 95 % interval of the loss at 256 tokens, the standard deviation pooled over mixers"
STATE_TICKS = tuple(2.0**power for power in range(10, 25, 2))
"""Ticks of state sizes in bytes."""
TIME_TICKS = 2e-3, 4e-3, 8e-3, 16e-3, 32e-3
"""Ticks of decode times in seconds."""

family: Callable[[str], str] = runpy.run_path(str(DOCS / "mixers.py"))["family"]
"""Function that returns the name of a mixer's family from its kind, as in the reference of mixers."""


def files(measured: Measured | None = None) -> dict[Path, str]:
    """Return the text of the page, and a picture for each size; the results are those of the file by default."""
    measured = read_measured(RESULTS) if measured is None else measured
    lines = [line for name, size in measured.sizes.items() for line in (*section(name, size), "")]
    pictures = {}
    for name, size in measured.sizes.items():
        pictures[PICTURES / f"{name.lower()}.svg"] = adaptive([losses(size)], 7.0)
        if drawn := costs_figures(size):
            pictures[PICTURES / f"{name.lower()}-costs.svg"] = adaptive(drawn, 7.0)
    return {TARGET: fill(TARGET, {"language": lines[:-1] or [UNMEASURED]}), **pictures}


def section(name: str, size: Size) -> Iterator[str]:
    """Yield the lines of one size: tables at equal tokens and in equal time, costs, and conditions."""
    picture = f"{PICTURES.name}/{name.lower()}"
    yield from (f"### {name} parameters, equal tokens", "", *equal_tokens(size), "")
    yield from (f"![Loss of every mixer with its interval, {name} parameters]({picture}.svg)", "")
    yield from (f"### {name} parameters, equal time", "", *equal_time(size), "")
    if any(model.costs is not None for model in size.models.values()):
        yield from (f"### {name} parameters, costs", "", *costs(size), "")
    if costs_figures(size):
        words = "Loss against state and against the time of a decoded token"
        yield from (f"![{words}, {name} parameters]({picture}-costs.svg)", "")
    machines = dict.fromkeys(
        f"seqmix {model.machine.seqmix} and torch {model.machine.torch} on {model.machine.processor}"
        for model in size.models.values()
    )
    yield from (f"- {run} failed: {why}" for run, why in size.failed.items())
    yield from ("",) * bool(size.failed)
    yield f"Conditions: {size.conditions}. Computed with {'; '.join(machines)}."


class Compared:
    """Losses in bits per byte, compared with each other and with those of the reference."""

    def __init__(self, scores: Mapping[str, list[float]]) -> None:
        self.scores = scores
        self.found = compare_scores(
            scores, subject=REFERENCE, higher_is_better=False, floor=LOSS_FLOOR / math.log(2), margin=MARGIN
        )

    def best_first(self) -> list[str]:
        """Return the entries, that with the lowest mean first."""
        return sorted(self.found.means, key=self.found.means.__getitem__)

    def interval(self, entry: str) -> tuple[float, float]:
        """Return the ends of the interval of an entry's mean, which are the mean without an interval."""
        mean, margin = self.found.means[entry], self.found.margins.get(entry, 0.0)
        return mean - margin, mean + margin

    def mean_text(self, entry: str) -> str:
        """Return an entry's mean and the margin of its interval as text."""
        return plus_minus(self.found.means[entry], self.found.margins.get(entry), 3)

    def cells(self, entry: str) -> list[str]:
        """Return an entry's loss, rank, and difference from the reference as text."""
        if entry not in self.found.means:
            return ["", "", ""]
        ranks = self.found.ranks.get(entry)
        difference = change_text(self.found.differences.get(entry))
        return [self.mean_text(entry), "" if ranks is None else rank_text(ranks), difference]

    def verdict(self, kind: str = "entry", reference: str = REFERENCE) -> str:
        """Return the sentences that the intervals allow; the words say what is compared, and with what."""
        found = self.found
        if not found.ranks or found.variance is None:
            return "There is one seed, so there is no interval: differences may be chance."
        first = [f"`{entry}`" for entry in self.best_first() if found.ranks[entry][0] == 1]
        counts: dict[Verdict, int] = dict.fromkeys(("better", "worse", "equivalent", "not separated"), 0)
        for each in found.differences.values():
            counts[each.verdict] += 1
        within = f"{counts['equivalent']} equivalent within {MARGIN:g} bits"
        against = (
            f" Against {reference}, {counts['better']} are better, {counts['worse']} worse, {within} and "
            f"{counts['not separated']} not separated."
        )
        best = f"No {kind} is better than {', '.join(first)}, by simultaneous intervals of all pairs."
        return f"{best}{against if found.differences else ''} {found.variance.sentence('bits')}"


def change_text(value: Difference | None) -> str:
    """Return a difference and half the width of its interval as text."""
    return (
        "" if value is None else f"{'+' if value.mean > 0 else ''}{plus_minus(value.mean, value.high - value.mean, 3)}"
    )


def at_length(size: Size, steps: int) -> Compared:
    """Return the comparison of the runs of a number of steps."""
    return Compared(losses_after(size.models, dict.fromkeys(size.models, steps)))


def family_findings(compared: Compared, size: Size) -> str:
    """Return a sentence on the families of which three members, and half of them, are separated on one side."""
    members: dict[str, list[Verdict]] = {}
    for entry, value in compared.found.differences.items():
        members.setdefault(family(size.models[entry].mixer), []).append(value.verdict)
    sides: tuple[Verdict, Verdict] = ("better", "worse")
    found = [
        f"{name} ({verdicts.count(side)} of {len(verdicts)} {side})"
        for name, verdicts in sorted(members.items())
        for side in sides
        if verdicts.count(side) >= max(3, len(verdicts) / 2)
    ]
    return f"Families that differ from {REFERENCE}, by the rule above: {', '.join(found) or 'none'}."


def worth_naming(compared: Compared, costs: Mapping[str, float]) -> list[str]:
    """Return the entries that are better than every cheaper entry, by intervals of all pairs, cheapest first."""
    pairs = compared.found.pairs
    ordered = sorted(costs.keys() & compared.found.ranks.keys(), key=lambda entry: (costs[entry], entry))
    cheaper = {entry: [other for other in ordered if costs[other] < costs[entry]] for entry in ordered}
    return [
        entry
        for entry in ordered
        if cheaper[entry] and all(pairs[entry, other].verdict == "better" for other in cheaper[entry])
    ]


def equal_tokens(size: Size) -> list[str]:
    """Return the verdict and the table at equal tokens."""
    compared = {steps: at_length(size, steps) for steps in LENGTHS}
    heads = ["mixer", "family", "convolution:"]
    for steps in LENGTHS:
        tokens = f"{steps * TOKENS / 1e6:.2f}M tokens"
        heads += [f"{tokens}, bits per byte:", "rank:", f"minus {REFERENCE}:", "learning rate:"]
    rows = []
    for name in _order(compared, size):
        model = size.models[name]
        row = [f"`{name}`", family(model.mixer), model.short_conv.replace("null", "none")]
        for steps in LENGTHS:
            trained = model.runs.get(str(steps))
            row += [*compared[steps].cells(name), f"{trained.learning_rate:g}" if trained else ""]
        rows.append(row)
    longest = compared[LENGTHS[0]]
    families = ["", family_findings(longest, size)] if longest.found.differences else []
    return [longest.verdict(), *families, "", *table(heads, rows), *_missing_seeds(size)]


def equal_time(size: Size) -> list[str]:
    """Return the verdict and the table in equal time; entries without an exact reading have a bound, and no rank."""
    timed = {name: model.costs for name, model in size.models.items() if model.costs is not None}
    steps = {name: TIME / costs.relative for name, costs in timed.items()}
    if not steps:
        return ["The times are to be measured: a study times its entries after its last run."]
    compared = Compared(losses_after(size.models, steps))
    rows = []
    for name in _order({0: compared}, size):
        model = size.models[name]
        if model.costs is None or (reading := model.losses_at(steps[name])) is None:
            continue
        cells = compared.cells(name)
        if reading.bound is not None:
            bound = sum(reading.losses.values()) / len(reading.losses) / math.log(2)
            cells = [f"{'≥' if reading.bound == 'at least' else '≤'} {bound:.3f}", "", ""]
        time = [f"{1e3 * model.costs.step_seconds:.0f}", f"{model.costs.relative:.2f}"]
        rows.append([f"`{name}`", *time, f"{steps[name] * TOKENS / 1e6:.2f}M", *cells])
    heads = ["mixer", "step, ms:", f"over {REFERENCE}'s:", "tokens:", "bits per byte:", "rank:", f"minus {REFERENCE}:"]
    lines = [compared.verdict("ranked entry"), "", *table(heads, rows)]
    rounds = [{name: TIME / costs.relative_range[end] for name, costs in timed.items()} for end in range(2)]
    for each in rounds:
        each[REFERENCE] = TIME  # its time is the unit
    readings = {
        f"With a floor of {FLOOR} nats in the power laws": [Compared(losses_after(size.models, steps, FLOOR))],
        "With a mixer's fastest or slowest round": [Compared(losses_after(size.models, each)) for each in rounds],
    }
    for condition, others in readings.items():
        lines += ["", *_sensitivity(condition, compared, others)]
    return lines


def _sensitivity(condition: str, compared: Compared, others: list[Compared]) -> list[str]:
    """Return a sentence on what other readings at equal time would change; an entry may be a bound in some of them."""
    losses = [0.0]
    differences = [0.0]
    changed = set()
    before = compared.found
    for after in (other.found for other in others):
        losses += [abs(before.means[name] - after.means[name]) for name in before.means.keys() & after.means.keys()]
        for name in before.differences.keys() & after.differences.keys():
            ours, theirs = before.differences[name], after.differences[name]
            differences.append(abs(ours.mean - theirs.mean))
            changed |= {name} if ours.verdict != theirs.verdict else set()
    which = f" (of {', '.join(f'`{name}`' for name in sorted(changed))})" if changed else ""
    return [
        f"{condition}, no loss changes by more than {max(losses):.3f} and no difference from {REFERENCE} by more than "
        f"{max(differences):.3f}; {len(changed)} of the verdicts against it would change{which}."
    ]


def costs(size: Size) -> list[str]:
    """Return the table of state and decoding, and before it the entries that are worth their cost."""
    rows = []
    for name, model in sorted(size.models.items()):
        if model.costs is not None:
            states = [quantity(model.costs.state_bytes.get(context), "bytes") for context in CONTEXTS]
            seconds = [model.costs.decode_seconds.get(context) for context in CONTEXTS]
            times = ["" if each is None else f"{1e3 * each:.2f}" for each in seconds]
            rows.append([f"`{name}`", f"{model.parameters:,}", *states, *times])
    at = [f"{int(context):,}" for context in CONTEXTS]
    heads = [*(f"state at {each}:" for each in at), *(f"ms per token at {each}:" for each in at)]
    return [*_worth_their_cost(size), *table(["mixer", "parameters:", *heads], rows)]


def _worth_their_cost(size: Size) -> list[str]:
    """Return a paragraph on the entries that are better than all cheaper ones; no lines without intervals."""
    compared = at_length(size, LENGTHS[0])
    if not compared.found.ranks:
        return []
    parts = []
    for cost, field in (("smaller state", "state_bytes"), ("shorter decode time", "decode_seconds")):
        entries = worth_naming(compared, _longest_context(size, field))
        names = ", ".join(f"`{entry}`" for entry in entries) or "none"
        parts.append(f"every mixer with a {cost}: {names}")
    after = f"{int(CONTEXTS[-1]):,} tokens"
    return [f"Better, by intervals of all pairs, than {'; than '.join(parts)}. Costs are those after {after}.", ""]


def _longest_context(size: Size, field: str) -> dict[str, float]:
    """Return the state bytes or decode seconds of all entries after the longest context; timed entries have them."""
    known = {name: getattr(model.costs, field, {}) for name, model in size.models.items()}
    return {name: float(each[CONTEXTS[-1]]) for name, each in known.items() if CONTEXTS[-1] in each}


def losses(size: Size) -> Figure:
    """Return the figure of every entry's loss at equal tokens, best first, by family."""
    names = {name: name for name in at_length(size, LENGTHS[0]).best_first()}
    caption = f"{INTERVALS}; lower is better."
    return Figure("losses", "Loss", caption, Axis("", names=list(names)), LOSS, _series(size, names), joined=False)


def costs_figures(size: Size) -> list[Figure]:
    """Return the figures of loss at equal tokens against state and decode time, by family; none before the timing."""
    after = f"after {int(CONTEXTS[-1]):,} tokens"
    caption = f"{INTERVALS}; lower and further left is better."
    state = Axis(f"state {after}", unit="bytes", log=True, ticks=STATE_TICKS)
    time = Axis(f"decode time per token {after}", unit="seconds", log=True, ticks=TIME_TICKS)
    drawn = []
    for title, field, axis in (
        ("Loss by state", "state_bytes", state),
        ("Loss by decode time", "decode_seconds", time),
    ):
        points = _series(size, _longest_context(size, field))
        drawn.append(Figure(field, title, caption, axis, LOSS, points, joined=False))
    return drawable(drawn)


def _series(size: Size, places: Mapping[str, float] | Mapping[str, str]) -> list[Series]:
    """Return the points of loss and interval at equal tokens, by family; an entry without a place has none."""
    compared = at_length(size, LENGTHS[0])
    families = sorted({family(model.mixer) for model in size.models.values()})
    points: dict[str, list[Point]] = {name: [] for name in families}
    for entry, mean in compared.found.means.items():
        if entry in places:
            points[family(size.models[entry].mixer)].append(Point(places[entry], mean, *compared.interval(entry)))
    return [Series(name, sorted(points[name]), style) for style, name in enumerate(families) if points[name]]


def _order(compared: Mapping[int, Compared], size: Size) -> list[str]:
    """Return the entries by the first loss that they have, best first."""

    def key(name: str) -> tuple[int, float]:
        means = [
            (place, each.found.means[name]) for place, each in enumerate(compared.values()) if name in each.found.means
        ]
        return means[0] if means else (len(compared), 0.0)

    return sorted(size.models, key=key)


def _missing_seeds(size: Size) -> list[str]:
    """Return a sentence on entries with fewer seeds than others; no lines if there are none."""
    counts = {
        f"`{name}` at {steps} steps": len(trained.losses)
        for name, model in size.models.items()
        for steps, trained in model.runs.items()
    }
    few = [name for name, count in counts.items() if count < max(counts.values())]
    return ["", f"Fewer seeds than the others: {', '.join(few)}."] if few else []


if __name__ == "__main__":
    try:
        measured = read_measured(RESULTS)
        for folder in sys.argv[1:]:
            measured = add(measured, read_results(folder))
        written = files(measured)
    except SeqmixError as error:
        sys.exit(str(error))
    if sys.argv[1:]:
        write_file(measured.model_dump_json(indent=1, exclude_defaults=True) + "\n", RESULTS)
    for file, text in written.items():
        write_file(text, file)
