"""From a study to its runs: every entry's configuration, matched, in every variant, with every rate and seed.

Seeds are outermost, so that a study that is stopped has something of every entry.
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
"""Runs of a study: planning builds the configuration of each."""
Variant = Mapping[str, Any]


@dataclass(frozen=True)
class PlannedEntry:
    """An entry in one variant."""

    name: str
    config: RunConfig
    """With the study's first seed, and its own learning rate."""
    matched: Matched | None = None

    @cached_property
    def cost(self) -> Cost:
        """What its model costs."""
        return whole_cost(self.config.model, self.config.data.sequence_length)


@dataclass(frozen=True)
class PlannedRun:
    """One run."""

    name: str
    """Of its folder."""
    entry: str
    variant: Variant
    config: RunConfig
    cost: Cost
    """What its model costs."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens that an optimizer step reads."""
        return self.config.training.batch_size * self.config.data.sequence_length

    @property
    def flops(self) -> float:
        """Operations of its training, three times the forward ones."""
        return 3.0 * self.config.training.steps * self.tokens_per_step * self.cost.flops_per_token


@dataclass(frozen=True)
class Plan:
    """All that a study makes."""

    study: Study
    entries: tuple[PlannedEntry, ...]
    """In the first variant."""
    runs: tuple[PlannedRun, ...]
    fairness: tuple[str, ...]
    """What is the same for all, and what is not, a sentence each."""

    @property
    def name(self) -> str:
        """The study's."""
        return self.study.name or "study"


def plan(study: Study, file: Path) -> Plan:
    """Work out the runs of a study; presets and files it names lie beside `file`, where it was read.

    Raises:
        SeqmixError: an entry is no configuration, cannot be matched, or would not be compared fairly.
    """
    if study.size > MOST_RUNS:
        raise StudyError(f"{file}: the study has {study.size:,} runs, and {MOST_RUNS:,} are planned at most")
    varied = [dict(zip(study.vary, values, strict=True)) for values in product(*study.vary.values())]
    solved: dict[Any, Matched] = {}
    variants = [_Variant(study, file, variant, solved).entries() for variant in varied]
    for variant, entries in zip(varied, variants, strict=True):
        require_fair(entries, variant)
        for entry in entries:
            try:
                _ = entry.cost  # can be built
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
                f"two runs would be called {run.name}: {dict(other.variant)} and {dict(run.variant)}; "
                "values of vary must differ in letters or digits"
            )


# ---- configurations


class _Variant:
    """The entries of one variant."""

    def __init__(self, study: Study, file: Path, variant: Variant, solved: dict[Any, Matched]) -> None:
        self.study = study
        self.file = file
        self.variant = variant
        self.solved = solved
        """Of other variants too: many have the same models."""
        self.read: dict[str, RunConfig] = {}
        """Entries before they are matched."""
        self.done: dict[str, PlannedEntry] = {}

    def entries(self) -> list[PlannedEntry]:
        """All of them, matched."""
        base = self._tree(self.study.base)
        for mixer in self.study.mixers:
            name = kind_of(mixer).rpartition(":")[2]
            self.read[name] = self._config(base, f"mixers: {name}", Entry(), mixer)
        for name, entry in self.study.entries.items():
            self.read[name] = self._config(base, f"entries.{name}", entry)
        return [self._matched(name) for name in self.study.names]

    def _config(self, tree: Node, place: str, entry: Entry, mixer: str | Mapping[str, Any] | None = None) -> RunConfig:
        if entry.extends is not None:
            tree = self._with_model_of(entry.extends, tree)
        tree = self._changed(tree, "", {key: getattr(self.study, key) for key in ("model", "data", "training")})
        if mixer is not None:
            tree = self._changed(tree, place, {"model": {"blocks": _with_mixer(mixer, tree)}})
        tree = self._changed(tree, place, {"model": entry.model, "training": entry.training})
        for path, value in entry.set.items():
            tree = self._changed(tree, place, _nested(path, value))
        for path, value in self.variant.items():
            tree = self._changed(tree, "vary", _nested(path, value))
        # last, so that what is wrong with the whole is said of the study
        return validated(RunConfig, self._changed(tree, "", {"seed": self.study.seeds[0]}))

    def _changed(self, tree: Node, place: str, changes: Mapping[str, Any]) -> Node:
        """The tree with changes that stand at a place of the study."""
        given = {key: value for key, value in changes.items() if value != {}}
        origin = Origin(f"{self.file}: {place}" if place else str(self.file))
        return change(tree, Node.of(given, origin), RunConfig) if given else tree

    def _with_model_of(self, source: str, tree: Node) -> Node:
        """The tree with another configuration's model, but its own vocabulary."""
        other = self._tree(source).child("model")
        before = tree.child("model")
        if other is None or other.entries is None:
            raise StudyError(f"{source} has no model to extend")
        vocabulary = before and before.child("vocab_size")
        model = {**other.entries, **({} if vocabulary is None else {"vocab_size": vocabulary})}
        return Node({**(tree.entries or {}), "model": Node(model, other.origin)}, tree.origin)

    def _matched(self, name: str, waiting: tuple[str, ...] = ()) -> PlannedEntry:
        """An entry, matched; `waiting` are the entries that are to cost as much as it."""
        if name in waiting:
            raise StudyError(f"{self.file}: entries match each other in a circle: {' -> '.join((*waiting, name))}")
        if name in self.done:
            return self.done[name]
        config = self.read[name]
        matched = None
        own = self.study.entries.get(name)
        match = own.match if own is not None and "match" in own.model_fields_set else self.study.match
        if match is not None and match.wanted != name:
            length = config.data.sequence_length
            wanted = self._wanted(match, length, (*waiting, name))
            key = config.model.model_dump_json(), match, wanted, None if match.metric == "parameters" else length
            try:
                if key not in self.solved:
                    self.solved[key] = solve(config.model, match, wanted, length=length)
            except SeqmixError as error:
                raise type(error)(f"{self.file}: {name}{where(self.variant)} cannot be matched: {error}") from None
            matched = self.solved[key]
            config = config.model_copy(update={"model": matched.model})
        return self.done.setdefault(name, PlannedEntry(name, config, matched))

    def _wanted(self, match: Match, length: int, waiting: tuple[str, ...]) -> float:
        """How much it is to cost."""
        wanted = match.wanted
        if not isinstance(wanted, str):
            return wanted
        if wanted in self.read:
            return cost_of(self._matched(wanted, waiting).config.model, match.metric, length)
        try:
            return cost_of(validated(RunConfig, self._tree(wanted)).model, match.metric, length)
        except ConfigError as error:
            raise StudyError(
                f"{self.file}: match: {wanted!r} is no entry ({', '.join(self.read)}) and no configuration: {error}"
            ) from None

    def _tree(self, source: str) -> Node:
        """What a preset says, or a file beside the study."""
        return read(source, PRESETS, RunConfig, folder=self.file.parent)


def _with_mixer(mixer: str | Mapping[str, Any], tree: Node) -> dict[str, Any]:
    """All blocks of a tree with one mixer; a kind alone has the heads of the mixer it replaces."""
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


def _nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


# ---- fairness


def require_fair(entries: list[PlannedEntry], variant: Variant) -> None:
    """Make sure that all read the same and are evaluated in the same way; a StudyError says what differs."""
    first = entries[0]
    if first.config.training.patience is not None:
        raise StudyError(
            f"training.patience is {first.config.training.patience}: entries would stop at different steps and read "
            "different numbers of tokens; set it to null in the study's training"
        )
    for place in ("seed", "model.vocab_size", "data", *(f"training.{name}" for name in SAME)):
        ours, *others = (attrgetter(place)(entry.config) for entry in entries)
        for other, theirs in zip(entries[1:], others, strict=True):
            if ours != theirs:
                raise StudyError(
                    f"{first.name} and {other.name} cannot be compared{where(variant)}: {place} is {ours!r} and "
                    f"{theirs!r}"
                )


def _fairness(study: Study, variants: list[list[PlannedEntry]]) -> Iterator[str]:
    """Sentences for a reader who has to trust the comparison."""
    entries = variants[0]
    config = entries[0].config
    training = config.training
    data = config.data
    tokens = training.steps * training.batch_size * data.sequence_length
    vary = f"; in variants by {', '.join(study.vary)}, the same for all" if study.vary else ""
    yield (
        f"Of one seed, every entry reads the same batches in the same order: {training.steps:,} steps of "
        f"{training.batch_size} sequences of {data.sequence_length:,} tokens, {tokens:,} tokens in all{vary}."
    )
    final = training.final_evaluation_batches
    batches = "all of the evaluation data" if final is None else f"{final} evaluation batches, the same for all"
    yield f"At the end every entry is judged by {batches}."
    counts = [[entry.cost.parameters for entry in entries] for entries in variants]
    spreads = {(min(count), max(count)) for count in counts}
    low, high = max(spreads, key=lambda spread: spread[1] / spread[0])
    apart = f"{100 * (high / low - 1):.2g} % apart"
    spread = f"{low:,}" if low == high else f"from {low:,} to {high:,} ({apart})"
    if len(spreads) > 1:
        spread = f"{apart} in a variant, or less"
    metrics = {str(entry.matched.metric) for entry in entries if entry.matched is not None}
    matched = f"matched by {' and '.join(sorted(metrics))}" if metrics else "not matched"
    yield f"Models are {matched}; their parameters are {spread}."
    if rates := ", ".join(f"{rate:g}" for rate in study.learning_rates):
        yield f"Each entry has its best of the learning rates {rates}, by mean final validation loss over the seeds."
    for name in type(training).model_fields:
        if name == "learning_rate" and rates:
            continue
        values = [getattr(entry.config.training, name) for entry in entries]
        if len(set(map(repr, values))) > 1:
            each = ", ".join(f"{entry.name} {value}" for entry, value in zip(entries, values, strict=True))
            yield f"training.{name} is an entry's own: {each}."
