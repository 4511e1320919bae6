"""The entries of a study in one variant: their configurations, with equal options, and matched to equal cost.

Values keep their place in the study's file, so that errors name the file and the line.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...mixers import MIXERS
from ...registry import ConfigError, SeqmixError, choices_hint, validated
from ...registry.merge import merged
from ...registry.sources import read
from ...registry.tree import Node, Origin
from ...training import PRESETS, RunConfig
from .equal_cost import Cost, Match, Matched, cost_of, solve, whole_cost
from .equal_options import Exempt, mixers_of, set_options
from .results import where
from .study import STUDIES, Entry, Study, StudyError, kind_of

Variant = Mapping[str, Any]
"""Values of the fields that vary, by dotted path."""


@dataclass(frozen=True)
class PlannedEntry:
    """An entry of a study in one variant."""

    name: str
    config: RunConfig
    """Configuration with the study's first seed and the entry's own learning rate."""
    matched: Matched | None = None
    """Result of matching; None if the entry is not matched."""
    exempt: tuple[Exempt, ...] = ()
    """Mixers of the entry that do not get the common value of an option of `equal`."""

    @cached_property
    def cost(self) -> Cost:
        """Costs of the entry's model."""
        return whole_cost(self.config.model, self.config.data.sequence_length)


class Source:
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
            found_keys, node = self.tree.find(keys)
            if found_keys == keys and node.plain() == value.plain():
                return node
        return value

    def place(self, *keys: str | int) -> str:
        """Return the place of a value, with which errors begin: file, line and keys; no line if the file lacks it."""
        found_keys, node = ((), None) if self.tree is None else self.tree.find(keys)
        origin = node.origin if node is not None and found_keys == keys else self.file
        return f"{origin}: {'.'.join(map(str, keys))}: "


class VariantEntries:
    """Builder of the entries of one variant."""

    def __init__(self, study: Study, source: Source, variant: Variant, solved: dict[Any, Matched]) -> None:
        self.study = study
        self.source = source
        self.file = source.file
        self.variant = variant
        self.solved = solved
        """Cache of matching results, shared by all variants, since many have the same models."""
        self.configs: dict[str, RunConfig] = {}
        """Configurations of the entries before matching."""
        self.exempt: dict[str, list[Exempt]] = {}
        """Mixers that do not get the common value of an option of `equal`, by entry."""
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
        """Return the configuration of an entry; `mixer` is the index of its mixer in the study's `mixers`."""
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
        tree = merged(tree, Node.of({"seed": self.study.seeds[0]}, Origin(str(self.file))), RunConfig)
        config = validated(RunConfig, tree)
        model, self.exempt[name] = set_options(config.model, self.study.options(self.variant))
        return config.model_copy(update={"model": model})

    def _apply(self, tree: Node, path: str, value: Node) -> Node:
        """Change the value at a dotted path of a tree."""
        if value.entries is not None and not value.entries and "." not in path:
            return tree
        for key in reversed(path.split(".")):
            value = Node({key: value}, value.origin)
        return merged(tree, value, RunConfig)

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
        """Match an entry to its wanted cost; `waiting` are the entries that are matched to this one's cost."""
        if name in waiting:
            raise StudyError(
                f"{self._place_of_match(name)}entries match each other in a circle: {' -> '.join((*waiting, name))}; "
                "match one of them to a number"
            )
        if name in self.planned:
            return self.planned[name]
        config = self.configs[name]
        matched = None
        entry = self.study.entries.get(name)
        match = entry.match if entry is not None and self._has_own_match(name) else self.study.match
        if match is not None and match.wanted != name:
            length = config.data.sequence_length
            wanted = self._wanted_cost(match, length, (*waiting, name), self._place_of_match(name))
            key = config.model.model_dump_json(), match, wanted, None if match.metric == "parameters" else length
            try:
                if key not in self.solved:
                    self.solved[key] = solve(config.model, match, wanted, length=length)
            except SeqmixError as error:
                place = self._place_of_match(name)
                raise type(error)(f"{place}{name}{where(self.variant)} cannot be matched: {error}") from None
            matched = self.solved[key]
            config = config.model_copy(update={"model": matched.model})
        planned = PlannedEntry(name, config, matched, tuple(self.exempt[name]))
        return self.planned.setdefault(name, planned)

    def _has_own_match(self, name: str) -> bool:
        """True if an entry has a match in place of the study's."""
        entry = self.study.entries.get(name)
        return entry is not None and "match" in entry.model_fields_set

    def _place_of_match(self, name: str) -> str:
        """Return the place of an entry's match in the file, with which errors begin."""
        return self.source.place(*(("entries", name, "match") if self._has_own_match(name) else ("match",)))

    def _wanted_cost(self, match: Match, length: int, waiting: tuple[str, ...], place: str) -> float:
        """Return the wanted cost of a match: its number, or the cost of the entry, preset or file that it names.

        Errors begin with `place`.
        """
        wanted = match.wanted
        if not isinstance(wanted, str):
            return wanted
        if wanted in self.configs:
            return cost_of(self._match(wanted, waiting).config.model, match.metric, length)
        try:
            tree = read(wanted, PRESETS, RunConfig, folder=self.file.parent)
            return cost_of(validated(RunConfig, tree).model, match.metric, length)
        except ConfigError as error:
            raise StudyError(
                f"{place}there is no entry {wanted!r}{choices_hint(wanted, self.configs, 'entries')}; read as a "
                f"configuration: {error}"
            ) from None

    def _read_tree(self, name: str, *keys: str) -> Node:
        """Read a preset, or a file beside the study; `keys` lead to its name in the study."""
        try:
            return read(name, PRESETS, RunConfig, folder=self.file.parent)
        except ConfigError as error:
            raise ConfigError(f"{self.source.place(*keys)}{error}") from None


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


def require_options(places: Mapping[str, str], entries: Iterable[PlannedEntry]) -> None:
    """Check that every option that is to be equal exists in some mixer, and that some mixer accepts its value.

    Args:
        places: by option, the place at which it is set, with which an error begins.
        entries: the entries that were planned with the options.

    Raises:
        StudyError: no mixer has an option, or all mixers refuse its value.
    """
    entries = list(entries)
    kinds = {mixer.kind: mixer for entry in entries for mixer in mixers_of(entry.config.model)}
    for option, place in places.items():
        if not any(option in type(mixer).model_fields for mixer in kinds.values()):
            known = dict.fromkeys(name for mixer in kinds.values() for name in type(mixer).model_fields)
            raise StudyError(f"{place}no mixer has this option{choices_hint(option, known)}")
        refused = [each for entry in entries for each in entry.exempt if each.option == option]
        if {each.mixer for each in refused} == set(kinds):
            reason = next(each.reason for each in refused if each.reason is not None)
            raise StudyError(f"{place}no mixer allows this value ({reason})")
