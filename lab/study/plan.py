"""Planning of a study: its runs, every entry in every variant with every learning rate and seed, checked to be fair.

The loop over seeds is outermost, so that a study that is stopped early has runs of every entry. With `tune`, the runs
that choose the learning rates come first; `Plan.with_rates` gives the other runs the rates that were chosen.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

from ...registry import SeqmixError
from ...training import RunConfig
from ..units import number, quantity
from .conclusion import names
from .config_differences import format_value
from .confounders import compare, equal_options, field_of
from .equal_cost import Cost, Matched
from .equal_options import equal_sentences
from .results import Difference, where
from .study import EQUAL_TRAINING_FIELDS, Study, StudyError, kind_of
from .study_entries import PlannedEntry, Source, Variant, VariantEntries, require_options

MAX_RUNS = 10_000
"""Maximum number of runs of a study; planning builds a configuration for each."""


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study: an entry in one variant, with one learning rate and one seed."""

    name: str
    """Name of the run and of its folder."""
    entry: str
    variant: Variant
    config: RunConfig
    cost: Cost
    """Costs of the run's model."""
    tunes: bool = False
    """True if the run only helps to choose the learning rate; its result is not reported."""
    awaits_learning_rate: bool = False
    """True if the learning rate has not been chosen yet; the configuration then has another one."""

    @property
    def group(self) -> str:
        """Name of the entry, and the variant in words: runs with an equal group share one tuned learning rate."""
        return self.entry + where(self.variant)

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step."""
        return self.config.training.batch_size * self.config.data.sequence_length

    @property
    def flops(self) -> float:
        """FLOPs of the whole training: three times those of the forward passes."""
        return 3.0 * self.config.training.steps * self.tokens_per_step * self.cost.flops_per_token


@dataclass(frozen=True)
class Plan:
    """A study with all its runs."""

    study: Study
    entries: tuple[PlannedEntry, ...]
    """Entries in the first variant."""
    runs: tuple[PlannedRun, ...]
    """All runs, those that tune first."""
    fairness: tuple[str, ...]
    """Sentences on what is the same for all entries and what is not."""
    differences: tuple[Difference, ...] = ()
    """Differences of each entry from the subject, in every variant."""

    @property
    def name(self) -> str:
        """Name of the study."""
        return self.study.name or "study"

    @property
    def subject(self) -> str:
        """Name of the entry that the question is about."""
        return self.study.subject or self.study.names[0]

    def with_rates(self, rates: Mapping[str, float]) -> "Plan":
        """Return the plan with the chosen learning rates, by `PlannedRun.group`; runs of other groups still wait."""
        return replace(self, runs=tuple(run if run.tunes else _with_rate(run, rates) for run in self.runs))


def _with_rate(run: PlannedRun, rates: Mapping[str, float]) -> PlannedRun:
    if not run.awaits_learning_rate or run.group not in rates:
        return run
    training = run.config.training.model_copy(update={"learning_rate": rates[run.group]})
    return replace(run, config=run.config.model_copy(update={"training": training}), awaits_learning_rate=False)


def plan(study: Study, file: Path, *, require_equal: bool = True) -> Plan:
    """Plan the runs of a study that was read from `file`; files that it names are relative to the folder of `file`.

    Options that are to be equal must exist in some mixer, unless `require_equal` is False.

    Raises:
        SeqmixError: an entry is not a valid configuration, cannot be matched, or would not be compared fairly.
    """
    if study.size > MAX_RUNS:
        raise StudyError(
            f"{file}: expected at most {MAX_RUNS:,} runs, got {study.size:,}: use fewer entries, seeds, learning "
            "rates or values under `vary`"
        )
    varied = [dict(zip(study.vary, values, strict=True)) for values in product(*study.vary.values())]
    solved: dict[Any, Matched] = {}
    source = Source(study, file)
    variants = [VariantEntries(study, source, variant, solved).entries() for variant in varied]
    for variant, entries in zip(varied, variants, strict=True):
        _require_full_length(entries[0], source)
        require_fair(entries, variant)
        for entry in entries:
            try:
                _ = entry.cost  # fails if the model cannot be built
            except SeqmixError as error:
                raise type(error)(f"{file}: {entry.name}{where(variant)}: {error}") from None
    if require_equal:
        require_options(_places(study, source), (entry for entries in variants for entry in entries))
    runs = [
        _run(study, entry, variant, seed, rate)
        for tuning, seeds in ((True, study.tuning_seeds), (False, study.seeds))
        for seed in seeds
        for variant, entries in zip(varied, variants, strict=True)
        for entry in entries
        for rate in (study.tune.learning_rate if study.tune and tuning else (None,))
    ]
    _require_names(runs)
    differences = [
        difference
        for variant, entries in zip(varied, variants, strict=True)
        for difference in _differences(study, entries, variant)
    ]
    fairness = (*_fairness(study, varied, variants), *_equal_line(study, variants[0], differences))
    return Plan(study, tuple(variants[0]), tuple(runs), fairness, tuple(differences))


def _places(study: Study, source: Source) -> dict[str, str]:
    """Return the place in the file at which each option that is to be equal is set; errors begin with it."""
    places = {option: source.place("equal", option) for option in study.equal}
    for path in study.vary:
        if path.startswith("equal."):
            places[path.removeprefix("equal.")] = source.place("vary", path)
    return places


def _run(study: Study, entry: PlannedEntry, variant: Variant, seed: int, rate: float | None) -> PlannedRun:
    """Plan a run; `rate` is the learning rate that a tuning run tries, None for the other runs."""
    config = entry.config.model_copy(update={"seed": seed})
    parts = [entry.name]
    for path, value in variant.items():
        parts.append(path.rpartition(".")[2] + re.sub(r"[^A-Za-z0-9.+-]+", "_", str(value)).strip("_"))
    if rate is not None:
        training = config.training.model_copy(update={"learning_rate": rate})
        config = config.model_copy(update={"training": training})
        parts.append(f"lr{rate:.16g}")
    name = "-".join([*parts, f"seed{seed}"])
    awaits_learning_rate = study.tune is not None and rate is None
    return PlannedRun(
        name, entry.name, variant, config, entry.cost, tunes=rate is not None, awaits_learning_rate=awaits_learning_rate
    )


def _require_names(runs: list[PlannedRun]) -> None:
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        if (other := seen.setdefault(run.name, run)) is not run:
            raise StudyError(
                f"two runs would be called {run.name}: {dict(other.variant)} and {dict(run.variant)}; choose values "
                "under `vary` that differ in letters or digits"
            )


# ---- fairness


def _differences(study: Study, entries: list[PlannedEntry], variant: Variant) -> list[Difference]:
    """Compare the entries of a variant with the study's subject."""
    named = {name: {"mixer.kind"} for name in study.names}
    for mixer in study.mixers:
        if not isinstance(mixer, str):
            name = kind_of(mixer).rpartition(":")[2]
            named[name] |= {field_of(f"model.blocks.x.mixer.{option}") for option in mixer}
    for name, entry in study.entries.items():
        named[name] |= {field_of(path) for path in entry.paths} | ({"*"} if entry.extends is not None else set())
    ignored = {field_of(f"model.{entry.matched.knob}") for entry in entries if entry.matched is not None}
    ignored |= set() if study.tune is None else {"training.learning_rate"}
    configs = {entry.name: entry.config for entry in entries}
    return compare(configs, study.subject or study.names[0], named, ignored, variant)


def _require_full_length(entry: PlannedEntry, source: Source) -> None:
    """Raise StudyError if runs may end before their last step; `source` gives the place of the field."""
    training = entry.config.training
    if training.patience is not None:
        raise StudyError(
            f"{source.place('training', 'patience')}expected null, got {training.patience}: entries would stop at "
            "different steps and read different numbers of tokens; set it to null in the study's training"
        )
    if training.max_time is not None:
        raise StudyError(
            f"{source.place('training', 'max_time')}expected null, got {training.max_time:g}: runs would end after "
            "different numbers of steps; limit the whole study with --budget"
        )


def require_fair(entries: list[PlannedEntry], variant: Variant) -> None:
    """Check that all entries are trained on the same batches and evaluated in the same way.

    Raises:
        StudyError: they are not; the message has the field that differs.
    """
    first = entries[0]
    for place in ("seed", "model.vocab_size", "data", *(f"training.{name}" for name in EQUAL_TRAINING_FIELDS)):
        ours, *others = (attrgetter(place)(entry.config) for entry in entries)
        for other, theirs in zip(entries[1:], others, strict=True):
            if ours != theirs:
                raise StudyError(
                    f"{first.name} and {other.name} cannot be compared{where(variant)}: expected equal {place}, got "
                    f"{ours!r} and {theirs!r}"
                )


def _fairness(study: Study, varied: list[dict[str, Any]], variants: list[list[PlannedEntry]]) -> Iterator[str]:
    """Yield sentences on what is equal in the comparison and what is not; `variants` has the entries by variant."""
    entries = variants[0]
    config = entries[0].config
    training = config.training
    data = config.data
    tokens = training.steps * training.batch_size * data.sequence_length
    vary = f"; variants differ in {', '.join(study.vary)}" if study.vary else ""
    if vary and not any(path.startswith("equal.") for path in study.vary):  # some mixers lack options of `equal`
        vary += ", alike for all entries"
    yield (
        f"With the same seed, all entries see the same batches in the same order: {training.steps:,} steps of "
        f"{training.batch_size} sequences of {data.sequence_length:,} tokens, {tokens:,} tokens in each run{vary}."
    )
    final = training.final_evaluation_batches
    batches = "all evaluation data" if final is None else f"the same {final} batches of {training.batch_size} sequences"
    yield f"At the end, every entry is evaluated on {batches}."
    counts = [[entry.cost.parameters for entry in entries] for entries in variants]
    spreads = {(min(count), max(count)) for count in counts}
    low, high = max(spreads, key=lambda spread: spread[1] / spread[0])
    percent = f"{100 * (high / low - 1):.2g} %"
    parameters = f"all have {low:,} parameters"
    if low != high:
        parameters = f"they have {low:,} to {high:,} parameters ({percent} apart)"
    if len(spreads) > 1:
        parameters = f"within a variant, their parameters are at most {percent} apart"
    metrics = {str(entry.matched.metric) for entry in entries if entry.matched is not None}
    matched = f"matched by {' and '.join(sorted(metrics))}" if metrics else "not matched"
    yield f"Models are {matched}; {parameters}."
    over = "over entries and variants" if len(variants) > 1 else "over entries"
    flops = [[entry.cost.flops_per_token for entry in entries] for entries in variants]
    if any(number(min(counts)) != number(max(counts)) for counts in flops):
        low, high = min(map(min, flops)), max(map(max, flops))
        percent = f"{100 * (max(max(counts) / min(counts) for counts in flops) - 1):.2g} % apart"
        yield (
            f"Not equal: the forward pass has {number(low)} to {number(high)} matmul FLOPs per token {over} "
            f"({f'within a variant at most {percent}' if len(variants) > 1 else percent})."
        )
    states = [[entry.cost.state_bytes for entry in entries] for entries in variants]
    if any(min(sizes) < max(sizes) for sizes in states):
        low, high = min(map(min, states)), max(map(max, states))
        yield (
            f"Not equal: the state of one sequence at the training length has {quantity(low, 'bytes')} to "
            f"{quantity(high, 'bytes')} {over}."
        )
    equal = (
        sentence
        for variant, entries in zip(varied, variants, strict=True)
        for sentence in equal_sentences(
            study.options(variant), [(entry.name, each) for entry in entries for each in entry.exempt]
        )
    )
    yield from dict.fromkeys(equal)
    if study.tune is None:
        yield _untuned(entry.config.training.learning_rate for entries in variants for entry in entries)
    else:
        rates = ", ".join(f"{rate:g}" for rate in study.tune.learning_rate)
        several = len(study.tuning_seeds) > 1
        tuning, seeds = (", ".join(map(str, each)) for each in (study.tuning_seeds, study.seeds))
        yield (
            f"Each entry's learning rate is tuned{' in each variant' * bool(study.vary)}: {rates} with "
            f"seed{'s' * several} {tuning}; the best has the lowest {'mean ' * several}final validation loss. Results "
            f"are those of other seeds at that rate: {seeds}. They are evaluated on the data that chose the rate."
        )


def _equal_line(study: Study, entries: list[PlannedEntry], differences: list[Difference]) -> Iterator[str]:
    """Yield a sentence with the line of the study's file that makes accessories of the mixers equal, if there is one.

    Options that the study itself sets are left out.
    """
    fields = dict.fromkeys(field for each in differences for field in each.also)
    fixed = {*study.equal_options, *(option for _, option in study.mixer_options())}
    configs = {entry.name: entry.config for entry in entries}
    options, equal = equal_options(
        configs, [field for field in fields if field not in fixed], study.subject or entries[0].name
    )
    if options:
        line = f"equal: {format_value(study.equal | options)}"
        yield f"To remove the difference in {names(equal)}, write in the study's file: {line}"


def _untuned(rates: Iterable[float]) -> str:
    """Return a sentence on the learning rates of all entries and variants, which are not tuned."""
    distinct = [f"{rate:g}" for rate in sorted(set(rates))]
    if len(distinct) == 1:
        return f"All entries use the learning rate {distinct[0]}, which was not tuned for each."
    return f"Not equal: entries use different learning rates ({', '.join(distinct)}), which were not tuned."
