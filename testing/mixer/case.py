"""One case of a mixer check: everything that was drawn, in a form that shrinks and can be written down."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal

import torch
from hypothesis import strategies as st

from ...mixers.traits import Traits
from ...ops.runtime.paradigm import Paradigm
from ..engine.shrink import fewer
from ..engine.source import WrittenCase

Start = Literal["none", "initial", "read", "moved"]
"""The state before the segment: None; the initial state; the state after a prefix of a few tokens; and after a prefix
of tokens of many sizes, which of a constant state is longer. All are states that tokens lead to, so that leaves which
depend on each other, as those of a symmetric matrix do, are as the mixer makes them."""

STARTS: tuple[Start, ...] = ("none", "initial", "read", "moved")

Use = Literal["evaluation", "training", "frozen", "truncated"]
"""How a mixer is called: evaluated with its final state; trained without one; the same where the tokens want no
gradient, as after a frozen embedding; trained with one, as by truncated backpropagation through time."""

IN_WORDS: dict[Use, str] = {
    "evaluation": "evaluated",
    "training": "trained, no final state wanted",
    "frozen": "trained, tokens without gradient",
    "truncated": "trained, a final state wanted",
}
USES: tuple[Use, ...] = tuple(IN_WORDS)

LENGTHS = (16, 17, 33, 65, 15, 31, 32, 63, 64, 70, 127, 128, 129, 130)
"""Tokens around the boundaries of blocks: tiles and chunks mostly hold a power of two."""

BETWEEN = tuple(length for length in range(12, max(LENGTHS)) if length not in LENGTHS)

CROWDS = (9, 33)
"""Rows of a large batch: above powers of two, up to which rows may be handled another way."""

MANY = 9
"""Documents beside a few."""

HEADS = (12, 1)
"""Heads of a wide mixer, beside its own: several, and one of more than 128 channels."""

FIXED = 1
"""The seed of cases that run in any case."""

SHORT = 12
"""Tokens of which one wide head, whose features may be the squares of its channels, takes little time."""

MEDIUM = 33
"""Tokens at most of a long piece of a wide mixer, whose backward pass may keep a megabyte for each."""

LAYERS = 3
"""Layers of the model that a mixer is built for."""


@dataclass(frozen=True, repr=False)
class Case(WrittenCase):
    """What a check runs on. Tensors are functions of `seed`, so a smaller case is a simpler one."""

    lengths: tuple[int, ...] = (1,)
    """Tokens of each piece, or of each packed document (which may be empty)."""
    batch_size: int = 1
    """Sequences."""
    start: Start = "none"
    paradigms: tuple[Paradigm, ...] = ()
    """One per piece, where pieces have their own."""
    rows: tuple[int, ...] = ()
    """Rows of a state, in the order they are taken."""
    use: Use = "evaluation"
    scale: float = 1.0
    """Standard deviation of the tokens' numbers."""
    layer: int = 0
    """The layer's index, of `LAYERS`."""
    wide: bool = False
    """True if the mixer has several tiles of channels or many heads, and not the fewest that fit."""
    seed: int = 0
    dtype: torch.dtype = torch.float64
    """Of parameters and inputs."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the configuration that differ from the one under test."""

    @property
    def final_state(self) -> bool:
        """True if its use wants a final state."""
        return self.use in ("evaluation", "truncated")

    @property
    def length(self) -> int:
        """Tokens in all."""
        return sum(self.lengths)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What a check wants drawn; the defaults are one segment from any state."""

    pieces: tuple[int, int] = (1, 1)
    """How many pieces or documents, at least and at most."""
    tokens: tuple[int, int] = (1, 11)
    """Tokens of each, at least and at most, but for the long ones."""
    long: int = 0
    """One piece in so many, on average, has one of `LENGTHS` instead; 0 is none."""
    longest: int = max(LENGTHS)
    """The longest of them."""
    many: int = 0
    """One case in so many, on average, has up to `MANY` more pieces; 0 is none."""
    lists: tuple[tuple[int, ...], ...] = ()
    """Lengths of further cases that run in any case."""
    chunk_size: int | None = None
    """Tokens of a chunk, where the configuration takes as many; by default it is drawn."""
    fixed: int = 0
    """Tokens of each in the cases that run in any case; as many as are drawn at most by default."""
    batch_size: tuple[int, int] = (1, 3)
    """Sequences, at least and at most, but for the large ones."""
    crowded: int = 0
    """One batch in so many, on average, has one of `CROWDS` as rows instead; 0 is none."""
    starts: tuple[Start, ...] = STARTS
    paradigms: bool = False
    """True if every piece has its own paradigm."""
    rows: bool = False
    """True if rows of the state are chosen."""
    uses: tuple[Use, ...] = ("evaluation",)
    scales: tuple[float, ...] = (1.0,)
    wide: int = 0
    """One case in so many, on average, has a wide mixer, if one fits; 0 is none."""
    options: bool = False
    """True if every value of every option comes by itself in a case that always runs."""
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)
    """Of parameters and inputs."""

    def of(self, traits: Traits) -> "Draw":
        """What of it there is for a mixer: one that has no state begins from nothing."""
        return self if traits.has_state else replace(self, starts=("none",))

    def fixed_cases(self, traits: Traits) -> list[Case]:
        """What is not left to chance: long segments in every paradigm, a large batch, each dtype, use and scale."""
        lengths = (self.fixed or self.tokens[1],) * self.pieces[0]
        usual = Case(lengths, self.batch_size[0], self.starts[-1], seed=FIXED, dtype=self.dtypes[0])
        long = (
            [(17, min(65, self.longest))]
            if self.pieces[1] > 1
            else [(length,) for length in (65, 130) if length <= self.longest]
        )
        cases = [replace(usual, lengths=lengths) for lengths in long if self.long and not self.fixed and not self.lists]
        listed = replace(usual, use=(*self.uses, *self.uses)[1])
        cases += [replace(listed, lengths=lengths) for lengths in self.lists]
        cases += [replace(listed, lengths=lengths, start=self.starts[0]) for lengths in self.lists]
        if self.crowded:
            cases += [replace(usual, batch_size=rows) for rows in CROWDS]
        if len(self.dtypes) > 1:
            cases += [replace(usual, dtype=dtype) for dtype in self.dtypes]
        cases += [replace(usual, use=use, layer=LAYERS - 1) for use in self.uses[1:]]
        begun = dict.fromkeys((self.starts[-1], self.starts[0]))
        cases += [replace(usual, scale=scale, start=start) for scale in {*self.scales} - {1.0} for start in begun]
        heads: list[dict[str, Any]] = [{}, *({"options": {"n_heads": number}} for number in HEADS)]
        heads = heads[:-1] if max(self.tokens[1], self.fixed) > SHORT else heads
        cases += [replace(usual, wide=True, **more) for more in heads] if self.wide else []
        cases += [replace(usual, wide=True, lengths=long[0])] if self.wide and self.long and not self.lists else []
        if self.wide and len(self.dtypes) > 1:  # of many heads, some decays are nearest to 1
            many = replace(usual, wide=True, dtype=self.dtypes[1], options={"n_heads": 12})
            cases = [many, *cases, replace(usual, wide=True, dtype=self.dtypes[-1])]
        if not self.paradigms:
            return cases
        return [replace(case, paradigms=(p,) * len(case.lengths)) for case in cases for p in sorted(traits.paradigms)]

    def typical(self, traits: Traits, options: dict[str, Any]) -> Case:
        """A case in which most of what can be drawn plays a part: several tokens and rows, a state, any paradigm."""
        least, most = self.tokens
        declared = sorted(traits.paradigms)
        rows = self.batch_size[1]
        case = Case((max(least, min(most, 7)),) * self.pieces[0], rows, self.starts[-1], use=self.uses[-1])
        if self.paradigms:
            case = replace(case, paradigms=tuple(declared[i % len(declared)] for i in range(self.pieces[0])))
        rearranged = (rows - 1, 0) if self.rows else ()
        return replace(case, rows=rearranged, dtype=self.dtypes[0], scale=self.scales[0], options=options)

    def simpler(self, case: Case) -> Iterator[Case]:
        """Cases that are simpler in one respect, within what is drawn; options may be none of the configuration."""
        lengths, options, chunk_size = case.lengths, dict(case.options), case.options.get("chunk_size", math.inf)
        for size in (2, 16):  # the second boundary of small chunks may do for one that many tokens lead to
            if size < chunk_size and case.length > 4 * size:
                short = tuple(min(length, max(2 * size + 1, self.tokens[0])) for length in lengths)
                yield replace(case, lengths=short, options=options | {"chunk_size": size})
        for i in range(len(lengths)) if len(lengths) > self.pieces[0] else ():
            rest = lengths[:i] + lengths[i + 1 :]
            if sum(rest):
                yield replace(case, lengths=rest, paradigms=case.paradigms[:i] + case.paradigms[i + 1 :])
        for i, length in enumerate(lengths):
            for short in fewer(length, self.tokens[0]):
                if short or case.length > length:
                    yield replace(case, lengths=(*lengths[:i], short, *lengths[i + 1 :]))
        for rows in fewer(case.batch_size, self.batch_size[0]):
            yield replace(case, batch_size=rows, rows=tuple(min(row, rows - 1) for row in case.rows))
        drawn = {"start": [start for start in STARTS if start in self.starts], "use": self.uses, "scale": self.scales}
        for name, values in {**drawn, "layer": range(LAYERS), "wide": (False, True)}.items():
            now = getattr(case, name)  # of a case that always runs, it may be none of those that are drawn
            yield from (replace(case, **{name: value}) for value in values[: values.index(now) if now in values else 0])
        # some go together: without one alone the others may be refused
        yield from (replace(case, options=few) for few in ({}, {"chunk_size": chunk_size}) if {*few} < {*options})
        for name in options:
            yield replace(case, options={other: value for other, value in options.items() if other != name})
        yield from (
            replace(case, options=options | {"chunk_size": size}) for size in (1, 2) if size < chunk_size < math.inf
        )
        yield from (replace(case, paradigms=(one,) * len(lengths)) for one in dict.fromkeys(case.paradigms))
        yield from (replace(case, rows=case.rows[:i]) for i in range(1, len(case.rows)))
        yield replace(case, seed=0)

    def cases(self, traits: Traits, options: Callable[[Random, bool], dict[str, Any]]) -> st.SearchStrategy[Case]:
        """The strategy: hypothesis draws a number, which all of a case is a function of.

        Drawn by a strategy for each field, cases would repeat: hypothesis makes new ones from parts of old ones, of a
        hundred not a dozen lengths differed.
        """
        long = [length for length in (*LENGTHS, *BETWEEN) if length <= self.longest]
        few, most = self.pieces

        def case(number: int) -> Case:
            chance, lengths = Random(number), ()
            if number == 0:  # what hypothesis tries first, and a quick run alone
                return self.typical(traits, options(chance, False))
            pieces = _sometimes(chance, self.many, range(most + 1, most + MANY), (few, most))
            while not sum(lengths):
                lengths = tuple(_sometimes(chance, self.long, long, self.tokens) for _ in range(pieces))
            rows = _sometimes(chance, self.crowded, CROWDS, self.batch_size)
            drawn = Case(
                lengths=lengths,
                batch_size=rows,
                start=chance.choice(self.starts),
                paradigms=tuple(chance.choice(sorted(traits.paradigms)) for _ in lengths) if self.paradigms else (),
                rows=tuple(chance.choices(range(rows), k=chance.randint(1, 4))) if self.rows else (),
                use=chance.choice(self.uses),
                scale=chance.choice(self.scales),
                layer=chance.randrange(LAYERS),
                wide=self.wide > 0 and chance.randrange(self.wide) == 0,
                seed=chance.randrange(2**16),
                dtype=chance.choice(self.dtypes),
                options=options(chance, True),
            )
            medium = max(MEDIUM, self.tokens[1])
            return replace(drawn, lengths=tuple(min(length, medium) for length in lengths)) if drawn.wide else drawn

        return st.integers(0, 2**64 - 1).map(case)


def _sometimes(chance: Random, one_in: int, rare: Sequence[int], usual: tuple[int, int]) -> int:
    """One of the rare one time in so many, never if that is 0; else at least and at most the usual."""
    return chance.choice(rare) if one_in and chance.randrange(one_in) == 0 else chance.randint(*usual)
