"""Planning of a study: every entry's configuration, matched, in every variant, with every learning rate and seed.

The loop over seeds is outermost, so that a study that is stopped early has runs of every entry. With `tune`, the runs
that choose the learning rates come first; `Plan.with_rates` gives the other runs the rates that were chosen.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..mixers import MIXERS
from ..registry import ConfigError, SeqmixError, choices, validated
from ..registry.change import change
from ..registry.sources import read
from ..registry.tree import Node, Origin
from ..training import PRESETS, RunConfig
from .attribution import compare, field_of
from .equal import Exempt, equal_sentences, mixers_of, set_options
from .match import Cost, Match, Matched, cost_of, solve, whole_cost
from .results import Difference, where
from .study import SAME, STUDIES, Entry, Study, StudyError, kind_of
from .units import quantity

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
    exempt: tuple[Exempt, ...] = ()
    """Mixers of the entry without an option that is equal in all others."""

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
    tunes: bool = False
    """True if the run only helps to choose the learning rate; its result is not reported."""
    waits: bool = False
    """True if the learning rate has not been chosen yet; the configuration then has another one."""

    @property
    def group(self) -> str:
        """The entry and the variant, for which one learning rate is chosen."""
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
    """What each entry differs in from the subject, in every variant."""

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
    if not run.waits or run.group not in rates:
        return run
    training = run.config.training.model_copy(update={"learning_rate": rates[run.group]})
    return replace(run, config=run.config.model_copy(update={"training": training}), waits=False)


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
    source = _Source(study, file)
    variants = [_Variant(study, source, variant, solved).entries() for variant in varied]
    for variant, entries in zip(varied, variants, strict=True):
        require_fair(entries, variant)
        for entry in entries:
            try:
                _ = entry.cost  # fails if the model cannot be built
            except SeqmixError as error:
                raise type(error)(f"{file}: {entry.name}{where(variant)}: {error}") from None
    _require_options(study, source, [entry for entries in variants for entry in entries])
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
    return Plan(study, tuple(variants[0]), tuple(runs), tuple(_fairness(study, varied, variants)), tuple(differences))


def _run(study: Study, entry: PlannedEntry, variant: Variant, seed: int, rate: float | None) -> PlannedRun:
    """Plan a run; a learning rate is given to runs that tune."""
    config = entry.config.model_copy(update={"seed": seed})
    parts = [entry.name]
    for path, value in variant.items():
        parts.append(path.rpartition(".")[2] + re.sub(r"[^A-Za-z0-9.+-]+", "_", str(value)).strip("_"))
    if rate is not None:
        training = config.training.model_copy(update={"learning_rate": rate})
        config = config.model_copy(update={"training": training})
        parts.append(f"lr{rate:.16g}")
    name = "-".join([*parts, f"seed{seed}"])
    waits = study.tune is not None and rate is None
    return PlannedRun(name, entry.name, variant, config, entry.cost, tunes=rate is not None, waits=waits)


def _require_names(runs: list[PlannedRun]) -> None:
    seen: dict[str, PlannedRun] = {}
    for run in runs:
        if (other := seen.setdefault(run.name, run)) is not run:
            raise StudyError(
                f"two runs would be called {run.name}: {dict(other.variant)} and {dict(run.variant)}; choose values of "
                "vary that differ in letters or digits"
            )


# ---- configurations


class _Source:
    """Places of a study's values in its file, for error messages."""

    def __init__(self, study: Study, file: Path) -> None:
        self.study = study
        self.file = file
        self.tree: Node | None = None
        with suppress(SeqmixError):  # the study was read already; without its file, errors have no lines
            self.tree = read(file, STUDIES, Study, folder=file.parent)

    def node(self, value: Any, *keys: str | int) -> Node:
        """Return a value with its place in the file; values that the file does not have get the keys as their place."""
        value = Node.of(value, Origin(f"{self.file}: {'.'.join(map(str, keys))}"))
        if self.tree is not None:
            found, node = self.tree.find(keys)
            if found == keys and node.plain() == value.plain():
                return node
        return value

    def place(self, value: Any, *keys: str | int) -> str:
        """Return the place of a value, as errors begin with it: file, line and keys."""
        origin = self.node(value, *keys).origin
        return f"{origin}: " if origin.line is None else f"{origin}: {'.'.join(map(str, keys))}: "


class _Variant:
    """Builder of the entries of one variant."""

    def __init__(self, study: Study, source: _Source, variant: Variant, solved: dict[Any, Matched]) -> None:
        self.study = study
        self.source = source
        self.file = source.file
        self.variant = variant
        self.solved = solved
        """Cache of matching results, shared by all variants, since many have the same models."""
        self.configs: dict[str, RunConfig] = {}
        """Configurations of the entries before matching."""
        self.exempt: dict[str, list[Exempt]] = {}
        """Mixers without the options that are equal in all others, by entry."""
        self.planned: dict[str, PlannedEntry] = {}
        """Entries that are matched already."""

    def entries(self) -> list[PlannedEntry]:
        """Return all entries, matched."""
        base = self._read_tree(self.study.base, "base")
        for number, mixer in enumerate(self.study.mixers):
            name = kind_of(mixer).rpartition(":")[2]
            self.configs[name] = self._config(name, base, Entry(), number)
        for name, entry in self.study.entries.items():
            self.configs[name] = self._config(name, base, entry)
        return [self._match(name) for name in self.study.names]

    def _config(self, name: str, tree: Node, entry: Entry, mixer: int | None = None) -> RunConfig:
        """Return the configuration of an entry; `mixer` is the index of the study's mixer that it has."""
        if entry.extends is not None:
            tree = self._with_model_of(entry.extends, tree, name)
        for part in ("model", "data", "training"):
            tree = self._apply(tree, part, self.source.node(getattr(self.study, part), part))
        if mixer is not None:
            blocks = _with_mixer(self.source.node(self.study.mixers[mixer], "mixers", mixer), tree)
            tree = self._apply(tree, "model", blocks)
        tree = self._apply(tree, "model", self.source.node(entry.model, "entries", name, "model"))
        tree = self._apply(tree, "training", self.source.node(entry.training, "entries", name, "training"))
        for path, value in entry.set.items():
            tree = self._apply(tree, path, self.source.node(value, "entries", name, "set", path))
        for path, value in self.variant.items():
            if not path.startswith("equal."):
                tree = self._apply(
                    tree, path, Node.of(value, self.source.node(self.study.vary[path], "vary", path).origin)
                )
        # the last change names the study's file as the origin of errors that concern the whole configuration
        tree = change(tree, Node.of({"seed": self.study.seeds[0]}, Origin(str(self.file))), RunConfig)
        config = validated(RunConfig, tree)
        model, self.exempt[name] = set_options(config.model, self.study.options(self.variant))
        return config.model_copy(update={"model": model})

    def _apply(self, tree: Node, path: str, value: Node) -> Node:
        """Change the value at a dotted path of a tree."""
        if value.entries is not None and not value.entries and "." not in path:
            return tree
        for key in reversed(path.split(".")):
            value = Node({key: value}, value.origin)
        return change(tree, value, RunConfig)

    def _with_model_of(self, source: str, tree: Node, name: str) -> Node:
        """Replace the model of a tree by another configuration's model, but keep the tree's vocabulary size."""
        other = self._read_tree(source, "entries", name, "extends").child("model")
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
        planned = PlannedEntry(name, config, matched, tuple(self.exempt[name]))
        return self.planned.setdefault(name, planned)

    def _wanted_cost(self, match: Match, length: int, waiting: tuple[str, ...]) -> float:
        """Return the cost that a match asks for: a number, or that of an entry, a preset or a file."""
        wanted = match.wanted
        if not isinstance(wanted, str):
            return wanted
        if wanted in self.configs:
            return cost_of(self._match(wanted, waiting).config.model, match.metric, length)
        try:
            tree = read(wanted, PRESETS, RunConfig, folder=self.file.parent)
            return cost_of(validated(RunConfig, tree).model, match.metric, length)
        except ConfigError as error:
            entries = ", ".join(list(self.configs)[:10])
            raise StudyError(
                f"{self.file}: match: {wanted!r} is neither a configuration ({error}) nor an entry; entries: {entries}"
            ) from None

    def _read_tree(self, name: str, *keys: str) -> Node:
        """Read a preset, or a file beside the study; `keys` lead to its name in the study."""
        try:
            return read(name, PRESETS, RunConfig, folder=self.file.parent)
        except ConfigError as error:
            raise ConfigError(f"{self.source.place(name, *keys)}{error}") from None


def _with_mixer(mixer: Node, tree: Node) -> Node:
    """Return changes that put one mixer into all blocks; a kind without options keeps the block's number of heads."""
    changes: dict[str, Node] = {}
    model = tree.child("model")
    blocks = model and model.child("blocks")
    for name, block in ((blocks and blocks.entries) or {}).items():
        before = block.child("mixer")
        kind = before and before.child("kind")
        new = mixer
        if isinstance(mixer.value, str):
            if kind is not None and kind.value == mixer.value:
                continue
            options = {"kind": mixer}
            heads = before and before.child("n_heads")
            with suppress(ConfigError):  # validation reports an unknown kind
                if (
                    heads is not None
                    and heads.value is not None
                    and "n_heads" in MIXERS.resolve(mixer.value).model_fields
                ):
                    options["n_heads"] = Node(heads.value, mixer.origin)
            new = Node(options, mixer.origin)
        changes[name] = Node({"mixer": new}, mixer.origin)
    return Node({"blocks": Node(changes, mixer.origin)}, mixer.origin) if changes else Node({}, mixer.origin)


def _require_options(study: Study, source: _Source, entries: list[PlannedEntry]) -> None:
    """Check that every option that is to be equal exists in some mixer and takes the value there.

    Raises:
        StudyError: it does not.
    """
    for option in study.equal_options:
        varied = f"equal.{option}"
        place = source.place(study.vary[varied], "vary", varied) if varied in study.vary else ""
        place = place or source.place(study.equal[option], "equal", option)
        kinds = {mixer.kind: mixer for entry in entries for mixer in mixers_of(entry.config.model)}
        if not any(option in type(mixer).model_fields for mixer in kinds.values()):
            known = dict.fromkeys(name for mixer in kinds.values() for name in type(mixer).model_fields)
            raise StudyError(f"{place}no mixer of the study has this option{choices(option, known)}")
        refused = [each for entry in entries for each in entry.exempt if each.option == option]
        if {each.mixer for each in refused} == set(kinds):
            reason = next(each.reason for each in refused if each.reason is not None)
            raise StudyError(f"{place}no mixer of the study allows this value ({reason})")


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


def _fairness(study: Study, varied: list[dict[str, Any]], variants: list[list[PlannedEntry]]) -> Iterator[str]:
    """Yield sentences on what is equal in the comparison and what is not; `variants` has the entries by variant."""
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
    states = [entry.cost.state_bytes for entry in entries]
    if min(states) < max(states):
        yield f"States of one sequence have {quantity(min(states), 'bytes')} to {quantity(max(states), 'bytes')}."
    equal = (
        sentence
        for variant, entries in zip(varied, variants, strict=True)
        for sentence in equal_sentences(
            study.options(variant), [(entry.name, each) for entry in entries for each in entry.exempt]
        )
    )
    yield from dict.fromkeys(equal)
    if study.tune is not None:
        rates = ", ".join(f"{rate:g}" for rate in study.tune.learning_rate)
        tuning = ", ".join(map(str, study.tuning_seeds))
        yield (
            f"Each entry's learning rate is tuned: {rates} with seed{'s' * (len(study.tuning_seeds) > 1)} {tuning}; "
            "the best has the lowest mean final validation loss. Results are those of other seeds at that rate: "
            f"{', '.join(map(str, study.seeds))}."
        )
