"""Planning of a study: every entry's configuration, matched, in every variant, with every learning rate and seed.

The loop over seeds is outermost, so that a study that is stopped early has runs of every entry.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..mixers import MIXERS
from ..registry import ConfigError, SeqmixError, validated
from ..registry.change import change
from ..registry.sources import read
from ..registry.tree import Node, Origin
from ..training import PRESETS, RunConfig
from .match import Cost, Match, Matched, cost_of, solve, whole_cost
from .results import where
from .study import SAME, Entry, Study, StudyError, kind_of

MOST_RUNS = 10_000
"""Most runs of a study; planning builds a configuration for each."""
Variant = Mapping[str, Any]


@dataclass(frozen=True)
class PlannedEntry:
    """An entry of a study in one variant."""

    name: str
    config: RunConfig
    """Configuration with the study's first seed and the entry's own learning rate."""
    matched: Matched | None = None
    """Result of matching; None if the entry is not matched."""

    @cached_property
    def cost(self) -> Cost:
        """Costs of the entry's model."""
        return whole_cost(self.config.model, self.config.data.sequence_length)


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
    fairness: tuple[str, ...]
    """Sentences on what is the same for all entries and what is not."""

    @property
    def name(self) -> str:
        """Name of the study."""
        return self.study.name or "study"


def plan(study: Study, file: Path) -> Plan:
    """Plan the runs of a study that was read from `file`; files that it names are relative to the folder of `file`.

    Raises:
        SeqmixError: an entry is not a valid configuration, cannot be matched, or would not be compared fairly.
    """
    if study.size > MOST_RUNS:
        raise StudyError(
            f"{file}: expected at most {MOST_RUNS:,} runs, got {study.size:,}: use fewer entries, seeds, learning "
            "rates or values of vary"
        )
    varied = [dict(zip(study.vary, values, strict=True)) for values in product(*study.vary.values())]
    solved: dict[Any, Matched] = {}
    variants = [_Variant(study, file, variant, solved).entries() for variant in varied]
    for variant, entries in zip(varied, variants, strict=True):
        require_fair(entries, variant)
        for entry in entries:
            try:
                _ = entry.cost  # fails if the model cannot be built
            except SeqmixError as error:
                raise type(error)(f"{file}: {entry.name}{where(variant)}: {error}") from None
    runs = [
        _run(study, entry, variant, rate, seed)
        for seed in study.seeds
        for variant, entries in zip(varied, variants, strict=True)
        for entry in entries
        for rate in study.learning_rates or (entry.config.training.learning_rate,)
    ]
    _require_names(runs)
    return Plan(study, tuple(variants[0]), tuple(runs), tuple(_fairness(study, variants)))


def _run(study: Study, entry: PlannedEntry, variant: Variant, rate: float, seed: int) -> PlannedRun:
    training = entry.config.training.model_copy(update={"learning_rate": rate})
    config = entry.config.model_copy(update={"training": training, "seed": seed})
    parts = [entry.name]
    for path, value in variant.items():
        parts.append(path.rpartition(".")[2] + re.sub(r"[^A-Za-z0-9.+-]+", "_", str(value)).strip("_"))
    if study.learning_rates:
        parts.append(f"lr{rate:.16g}")
    return PlannedRun("-".join([*parts, f"seed{seed}"]), entry.name, variant, config, entry.cost)


def _require_names(runs: list[PlannedRun]) -> None:
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        if (other := seen.setdefault(run.name, run)) is not run:
            raise StudyError(
                f"two runs would be called {run.name}: {dict(other.variant)} and {dict(run.variant)}; choose values of "
                "vary that differ in letters or digits"
            )


# ---- configurations


class _Variant:
    """Builder of the entries of one variant."""

    def __init__(self, study: Study, file: Path, variant: Variant, solved: dict[Any, Matched]) -> None:
        self.study = study
        self.file = file
        self.variant = variant
        self.solved = solved
        """Cache of matching results, shared by all variants, since many have the same models."""
        self.configs: dict[str, RunConfig] = {}
        """Configurations of the entries before matching."""
        self.planned: dict[str, PlannedEntry] = {}
        """Entries that are matched already."""

    def entries(self) -> list[PlannedEntry]:
        """Return all entries, matched."""
        base = self._read_tree(self.study.base)
        for mixer in self.study.mixers:
            name = kind_of(mixer).rpartition(":")[2]
            self.configs[name] = self._config(base, f"mixers: {name}", Entry(), mixer)
        for name, entry in self.study.entries.items():
            self.configs[name] = self._config(base, f"entries.{name}", entry)
        return [self._match(name) for name in self.study.names]

    def _config(self, tree: Node, place: str, entry: Entry, mixer: str | Mapping[str, Any] | None = None) -> RunConfig:
        if entry.extends is not None:
            tree = self._with_model_of(entry.extends, tree)
        tree = self._apply(tree, "", {key: getattr(self.study, key) for key in ("model", "data", "training")})
        if mixer is not None:
            tree = self._apply(tree, place, {"model": {"blocks": _with_mixer(mixer, tree)}})
        tree = self._apply(tree, place, {"model": entry.model, "training": entry.training})
        for path, value in entry.set.items():
            tree = self._apply(tree, place, _nest(path, value))
        for path, value in self.variant.items():
            tree = self._apply(tree, "vary", _nest(path, value))
        # the last change names the study's file as the origin of errors that concern the whole configuration
        return validated(RunConfig, self._apply(tree, "", {"seed": self.study.seeds[0]}))

    def _apply(self, tree: Node, place: str, changes: Mapping[str, Any]) -> Node:
        """Apply changes to a tree; `place` is where the study has them, for error messages."""
        changes = {key: value for key, value in changes.items() if value != {}}
        origin = Origin(f"{self.file}: {place}" if place else str(self.file))
        return change(tree, Node.of(changes, origin), RunConfig) if changes else tree

    def _with_model_of(self, source: str, tree: Node) -> Node:
        """Replace the model of a tree by another configuration's model, but keep the tree's vocabulary size."""
        other = self._read_tree(source).child("model")
        before = tree.child("model")
        if other is None or other.entries is None:
            raise StudyError(f"{source} has no model to extend: name a preset or a configuration file with a model")
        vocabulary = before and before.child("vocab_size")
        model = {**other.entries, **({} if vocabulary is None else {"vocab_size": vocabulary})}
        return Node({**(tree.entries or {}), "model": Node(model, other.origin)}, tree.origin)

    def _match(self, name: str, waiting: tuple[str, ...] = ()) -> PlannedEntry:
        """Match an entry to the cost that is asked of it; `waiting` are the entries that need this one's cost first."""
        if name in waiting:
            raise StudyError(
                f"{self.file}: entries match each other in a circle: {' -> '.join((*waiting, name))}; match one of "
                "them to a number"
            )
        if name in self.planned:
            return self.planned[name]
        config = self.configs[name]
        matched = None
        entry = self.study.entries.get(name)
        match = entry.match if entry is not None and "match" in entry.model_fields_set else self.study.match
        if match is not None and match.wanted != name:
            length = config.data.sequence_length
            wanted = self._wanted_cost(match, length, (*waiting, name))
            key = config.model.model_dump_json(), match, wanted, None if match.metric == "parameters" else length
            try:
                if key not in self.solved:
                    self.solved[key] = solve(config.model, match, wanted, length=length)
            except SeqmixError as error:
                raise type(error)(f"{self.file}: {name}{where(self.variant)} cannot be matched: {error}") from None
            matched = self.solved[key]
            config = config.model_copy(update={"model": matched.model})
        return self.planned.setdefault(name, PlannedEntry(name, config, matched))

    def _wanted_cost(self, match: Match, length: int, waiting: tuple[str, ...]) -> float:
        """Return the cost that a match asks for: a number, or that of an entry, a preset or a file."""
        wanted = match.wanted
        if not isinstance(wanted, str):
            return wanted
        if wanted in self.configs:
            return cost_of(self._match(wanted, waiting).config.model, match.metric, length)
        try:
            return cost_of(validated(RunConfig, self._read_tree(wanted)).model, match.metric, length)
        except ConfigError as error:
            entries = ", ".join(list(self.configs)[:10])
            raise StudyError(
                f"{self.file}: match: {wanted!r} is neither a configuration ({error}) nor an entry; entries: {entries}"
            ) from None

    def _read_tree(self, source: str) -> Node:
        """Read a preset, or a file beside the study."""
        return read(source, PRESETS, RunConfig, folder=self.file.parent)


def _with_mixer(mixer: str | Mapping[str, Any], tree: Node) -> dict[str, Any]:
    """Return changes that put one mixer into all blocks; a kind without options keeps the block's number of heads."""
    changes: dict[str, Any] = {}
    for name, block in ((tree.plain().get("model") or {}).get("blocks") or {}).items():
        before = (block or {}).get("mixer") or {}
        if not isinstance(mixer, str):
            changes[name] = {"mixer": mixer}
        elif before.get("kind") != mixer:
            changes[name] = {"mixer": {"kind": mixer}}
            if before.get("n_heads") is not None and "n_heads" in MIXERS.resolve(mixer).model_fields:
                changes[name]["mixer"]["n_heads"] = before["n_heads"]
    return changes


def _nest(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


# ---- fairness


def require_fair(entries: list[PlannedEntry], variant: Variant) -> None:
    """Check that all entries are trained on the same batches and evaluated in the same way.

    Raises:
        StudyError: they are not; the message has the field that differs.
    """
    first = entries[0]
    if first.config.training.patience is not None:
        raise StudyError(
            f"expected training.patience to be null, got {first.config.training.patience}: entries would stop at "
            "different steps and read different numbers of tokens; set it to null in the study's training"
        )
    for place in ("seed", "model.vocab_size", "data", *(f"training.{name}" for name in SAME)):
        ours, *others = (attrgetter(place)(entry.config) for entry in entries)
        for other, theirs in zip(entries[1:], others, strict=True):
            if ours != theirs:
                raise StudyError(
                    f"{first.name} and {other.name} cannot be compared{where(variant)}: expected equal {place}, got "
                    f"{ours!r} and {theirs!r}"
                )


def _fairness(study: Study, variants: list[list[PlannedEntry]]) -> Iterator[str]:
    """Yield sentences on what is equal in the comparison and what is not."""
    entries = variants[0]
    config = entries[0].config
    training = config.training
    data = config.data
    tokens = training.steps * training.batch_size * data.sequence_length
    vary = f"; variants differ in {', '.join(study.vary)}, alike for all entries" if study.vary else ""
    yield (
        f"With the same seed, all entries see the same batches in the same order: {training.steps:,} steps of "
        f"{training.batch_size} sequences of {data.sequence_length:,} tokens, {tokens:,} tokens in all{vary}."
    )
    final = training.final_evaluation_batches
    batches = "all evaluation data" if final is None else f"the same {final} evaluation batches"
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
    if rates := ", ".join(f"{rate:g}" for rate in study.learning_rates):
        yield f"Each entry is reported at its best learning rate of {rates}, by mean final validation loss over seeds."
    for name in type(training).model_fields:
        if name == "learning_rate" and rates:
            continue
        values = [getattr(entry.config.training, name) for entry in entries]
        if len(set(map(repr, values))) > 1:
            each = ", ".join(f"{entry.name} {value}" for entry, value in zip(entries, values, strict=True))
            yield f"training.{name} differs between entries: {each}."
