"""One case of a check: everything that was drawn, in a form that shrinks and can be written down."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from hypothesis import strategies as st

from ...registry import Config
from ..base import Traits
from ..paradigm import Paradigm

Start = Literal["none", "initial", "read", "moved"]
"""What comes before the segment: None; the state of nothing read; a state that has read a few tokens; such a state with
every float in it moved, so that it is no state that any short text leads to."""

STARTS: tuple[Start, ...] = ("none", "initial", "read", "moved")


@dataclass(frozen=True)
class Case:
    """What a check runs on. Tensors are functions of `seed`, so a smaller case is a simpler one."""

    lengths: tuple[int, ...] = (1,)
    """Tokens of each piece, or of each packed document (which may be empty)."""
    batch_size: int = 1
    """Sequences."""
    start: Start = "none"
    """What comes before."""
    paradigms: tuple[Paradigm, ...] = ()
    """A paradigm a piece, where pieces have their own."""
    rows: tuple[int, ...] = ()
    """Rows of a state, in the order they are taken."""
    seed: int = 0
    """All tensors are functions of it."""
    dtype: torch.dtype = torch.float64
    """Of parameters and inputs."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the configuration that differ from the one under test."""

    @property
    def length(self) -> int:
        """Tokens in all."""
        return sum(self.lengths)

    def __repr__(self) -> str:
        """As Python; only what differs from the defaults."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return f"Case({_arguments({k: v for k, v in values.items() if v != getattr(_DEFAULT, k)})})"


_DEFAULT = Case()


def source(value: Any) -> str:
    """A value as Python that makes it; of a configuration, the fields that are not the default."""
    if isinstance(value, Config):
        given = {name: getattr(value, name) for name in type(value).model_fields}
        defaults = {name: field.default for name, field in type(value).model_fields.items()}
        return f"{type(value).__name__}({_arguments({k: v for k, v in given.items() if v != defaults[k]})})"
    if isinstance(value, Paradigm):
        return f"Paradigm.{value.name}"
    if isinstance(value, tuple):
        return f"({', '.join(map(source, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {source(item)}" for name, item in value.items()) + "}"
    return repr(value)


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={source(value)}" for name, value in values.items())


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What a check wants drawn; the defaults are one segment from any state."""

    pieces: tuple[int, int] = (1, 1)
    """How many pieces or documents, at least and at most."""
    tokens: tuple[int, int] = (1, 11)
    """Tokens of each, at least and at most."""
    batch_size: tuple[int, int] = (1, 3)
    """Sequences, at least and at most."""
    starts: tuple[Start, ...] = STARTS
    """What may come before."""
    paradigms: bool = False
    """Whether every piece has a paradigm of its own."""
    rows: bool = False
    """Whether rows of the state are chosen."""
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)
    """Of parameters and inputs."""

    def cases(self, traits: Traits, options: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[Case]:
        """The strategy."""
        paradigm = st.sampled_from(sorted(traits.paradigms))

        @st.composite
        def case(draw: Callable[..., Any]) -> Case:
            lengths = draw(
                st.lists(st.integers(*self.tokens), min_size=self.pieces[0], max_size=self.pieces[1]).filter(sum)
            )
            batch_size = draw(st.integers(*self.batch_size))
            return Case(
                lengths=tuple(lengths),
                batch_size=batch_size,
                start=draw(st.sampled_from(self.starts)),
                paradigms=tuple(draw(paradigm) for _ in lengths) if self.paradigms else (),
                rows=tuple(draw(st.lists(st.integers(0, batch_size - 1), min_size=1, max_size=4))) if self.rows else (),
                seed=draw(st.integers(0, 2**16)),
                dtype=draw(st.sampled_from(self.dtypes)),
                options=draw(options),
            )

        return case()
