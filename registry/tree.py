"""A YAML document as a tree in which every value knows where it was written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Scalar = str | int | float | bool | None
Key = str | int

COMMAND_LINE = "command line"
"""The name of the command line in errors."""


@dataclass(frozen=True)
class Origin:
    """Where a value was written."""

    source: str
    """A file, or `COMMAND_LINE`."""
    line: int | None = None
    """Counted from 1; None on the command line."""

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Node:
    """A value and its origin: the place of its key in a mapping, otherwise its own."""

    value: "Mapping[str, Node] | tuple[Node, ...] | Scalar"
    origin: Origin

    @classmethod
    def of(cls, value: Any, origin: Origin) -> "Node":
        """The tree of plain values, all of one origin."""
        if isinstance(value, Mapping):
            return cls({str(key): cls.of(entry, origin) for key, entry in value.items()}, origin)
        return cls(tuple(cls.of(item, origin) for item in value) if isinstance(value, list | tuple) else value, origin)

    @property
    def entries(self) -> "Mapping[str, Node] | None":
        """The entries of a mapping; None for anything else."""
        return self.value if isinstance(self.value, Mapping) else None

    def plain(self) -> Any:
        """The value without origins: dicts, lists and scalars."""
        if isinstance(self.value, Mapping):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        return self.value

    def parts(self) -> "Iterator[Node]":
        """All values in it, itself first."""
        yield self
        if isinstance(self.value, Mapping | tuple):
            for node in self.value.values() if isinstance(self.value, Mapping) else self.value:
                yield from node.parts()

    def merge(self, difference: "Node") -> "Node":
        """This value, changed by a difference.

        Mappings merge key by key. Everything else is replaced: scalars, null, lists, and a mapping whose `kind`
        changes, since the keys of one kind mean nothing to another.
        """
        if self.entries is None or difference.entries is None:
            return difference
        kind = self.child("kind")
        new_kind = difference.child("kind")
        if kind is not None and new_kind is not None and kind.plain() != new_kind.plain():
            # if keys of the new kind are missing, the error belongs where the kind was changed
            return Node(difference.entries, new_kind.origin)
        merged = {
            key: before.merge(node) if (before := self.child(key)) else node for key, node in difference.entries.items()
        }
        return Node({**self.entries, **merged}, difference.origin)

    def find(self, location: Sequence[Key]) -> "tuple[tuple[Key, ...], Node]":
        """The deepest value on the way along a location, and the keys that lead to it.

        Parts that are not keys are skipped: pydantic puts the names of union branches among the keys.
        """
        keys: tuple[Key, ...] = ()
        node = self
        for part in location:
            child = node.child(part)
            if child is not None:
                keys = (*keys, part)
                node = child
        return keys, node

    def child(self, key: Key) -> "Node | None":
        """The entry of a mapping or the item of a list; None if it does not exist."""
        if isinstance(self.value, Mapping):
            return self.value.get(key) if isinstance(key, str) else None
        if isinstance(self.value, tuple) and isinstance(key, int) and key < len(self.value):
            return self.value[key]
        return None
