"""A YAML document as a tree in which every value has its origin: source and line."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Scalar = str | int | float | bool | None
Key = str | int

COMMAND_LINE = "command line"
"""The name of the command line in errors."""


@dataclass(frozen=True)
class Origin:
    """The source and line at which a value was written."""

    source: str
    """Name of the file, or `COMMAND_LINE`."""
    line: int | None = None
    """Number of the line, from 1; None on the command line."""

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Node:
    """A value of a YAML document and its origin: in a mapping the line of its key, else the line of the value."""

    value: "Mapping[str, Node] | tuple[Node, ...] | Scalar"
    origin: Origin

    @classmethod
    def of(cls, value: Any, origin: Origin) -> "Node":
        """Return the tree of plain values, all with the same origin."""
        if isinstance(value, Mapping):
            return cls({str(key): cls.of(entry, origin) for key, entry in value.items()}, origin)
        return cls(tuple(cls.of(item, origin) for item in value) if isinstance(value, list | tuple) else value, origin)

    @property
    def entries(self) -> "Mapping[str, Node] | None":
        """Entries of a mapping; None for any other value."""
        return self.value if isinstance(self.value, Mapping) else None

    def plain(self) -> Any:
        """Return the value without origins: dicts, lists and scalars."""
        if isinstance(self.value, Mapping):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        return self.value

    def parts(self) -> "Iterator[Node]":
        """Yield this value and all values nested in it."""
        yield self
        if isinstance(self.value, Mapping | tuple):
            for node in self.value.values() if isinstance(self.value, Mapping) else self.value:
                yield from node.parts()

    def merge(self, difference: "Node") -> "Node":
        """Return this value, changed by a difference.

        Mappings merge key by key. Other values are replaced: scalars, null, lists, and a mapping whose `kind` changes,
        because the keys of one kind have no meaning for another.
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
        """Return the keys of `location` that exist, and the value to which they lead.

        Parts of `location` that are not keys are skipped: pydantic puts the names of allowed types among the keys.
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
        """Return the entry of a mapping or the item of a list; None if it does not exist."""
        if isinstance(self.value, Mapping):
            return self.value.get(key) if isinstance(key, str) else None
        if isinstance(self.value, tuple) and isinstance(key, int) and key < len(self.value):
            return self.value[key]
        return None
