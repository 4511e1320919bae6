"""A case of a mixer check: everything that was drawn, in a form that can be reduced and written as Python."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal

import torch
from hypothesis import strategies as st

from ...mixers.base.traits import Traits
from ...ops.runtime.paradigm import Paradigm
from ..engine.shrink import fewer
from ..engine.source import WrittenCase

Start = Literal["none", "initial", "read", "moved"]
"""State before the segment. "none": None; "initial": the initial state; "read": the state after a prefix of a few
tokens; "moved": the state after a prefix of tokens of many sizes, which is longer if the state is constant. Every
state comes from tokens, so constraints between its numbers, such as a symmetric matrix, hold."""

STARTS: tuple[Start, ...] = ("none", "initial", "read", "moved")

Use = Literal["evaluation", "training", "frozen", "truncated"]
"""Ways to call a mixer. "evaluation": evaluation mode with the final state; "training": training mode without a final
state; "frozen": the same, and the tokens need no gradient, as after a frozen embedding; "truncated": training mode
with the final state, as in truncated backpropagation through time."""

USES_IN_WORDS: dict[Use, str] = {
    "evaluation": "evaluation",
    "training": "training without a final state",
    "frozen": "training, tokens without gradient",
    "truncated": "training with a final state",
}
"""The uses in words, for reports."""
USES: tuple[Use, ...] = tuple(USES_IN_WORDS)

LENGTHS = (16, 17, 33, 65, 15, 31, 32, 63, 64, 70, 127, 128, 129, 130)
"""Lengths in tokens around the boundaries of blocks: tiles and chunks mostly hold a power of two tokens."""

BETWEEN = tuple(length for length in range(12, max(LENGTHS)) if length not in LENGTHS)
"""Further lengths of long pieces, between those of `LENGTHS`."""

CROWDS = (9, 33)
"""Numbers of rows of large batches: just above powers of two, where code for small batches may no longer be used."""

MANY = 9
"""Exclusive upper bound of the additional pieces or documents in a case that has many (`Draw.many`)."""

HEADS = (12, 1)
"""Numbers of heads to try in a wide mixer, besides the configured one; a single head has more than 128 channels."""

FIXED = 1
"""Seed of the fixed cases, which always run."""

SHORT = 12
"""Longest segment, in tokens, on which a single wide head is tried, which may have width^2 features."""

MEDIUM = 33
"""Longest piece of a wide mixer, in tokens: its backward pass may keep a megabyte per token."""

LAYERS = 3
"""Number of layers of the model that a mixer is built for."""


@dataclass(frozen=True, repr=False)
class Case(WrittenCase):
    """The input of a check. Tensors are functions of `seed`, so a case is small and can be written down."""

    lengths: tuple[int, ...] = (1,)
    """Number of tokens of each piece, or of each packed document (which may be empty)."""
    batch_size: int = 1
    """Number of sequences."""
    start: Start = "none"
    """State before the segment."""
    paradigms: tuple[Paradigm, ...] = ()
    """Paradigm of each piece; empty if the check does not draw one per piece."""
    rows: tuple[int, ...] = ()
    """Indices of the rows of a state to select, in this order."""
    use: Use = "evaluation"
    """Way to call the mixer."""
    scale: float = 1.0
    """Standard deviation of the elements of the tokens."""
    layer: int = 0
    """Index of the mixer's layer in a model of `LAYERS` layers."""
    wide: bool = False
    """True if the mixer has several tiles of channels or many heads, rather than the smallest width that fits."""
    seed: int = 0
    """Seed of the tensors."""
    dtype: torch.dtype = torch.float64
    """Dtype of parameters and inputs."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Changes to the configuration under test: new values by name of the field."""

    @property
    def final_state(self) -> bool:
        """True if the case's use asks for a final state."""
        return self.use in ("evaluation", "truncated")

    @property
    def length(self) -> int:
        """Total number of tokens of all pieces or documents."""
        return sum(self.lengths)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Specification of the cases that a check draws. The defaults draw one segment from any state."""

    pieces: tuple[int, int] = (1, 1)
    """Fewest and most pieces or documents."""
    tokens: tuple[int, int] = (1, 11)
    """Fewest and most tokens of a piece or document, except for long ones."""
    long: int = 0
    """One piece in this many, on average, is long: its length is in `LENGTHS` or `BETWEEN`. 0 draws no long piece."""
    longest: int = max(LENGTHS)
    """Longest length of a long piece, in tokens."""
    many: int = 0
    """One case in this many, on average, has 1 to `MANY` - 1 more pieces than `pieces` allows. 0 draws no such case."""
    lists: tuple[tuple[int, ...], ...] = ()
    """Lengths of the pieces or documents of further fixed cases, which always run."""
    chunk_size: int | None = None
    """Chunk length in tokens, if the configuration accepts it; None draws one."""
    fixed: int = 0
    """Number of tokens of a piece or document in the fixed cases; 0 uses the upper bound of `tokens`."""
    batch_size: tuple[int, int] = (1, 3)
    """Fewest and most sequences, except in large batches."""
    crowded: int = 0
    """One batch in this many, on average, is large: its size is in `CROWDS`. 0 draws no large batch."""
    starts: tuple[Start, ...] = STARTS
    """States before the segment to draw from."""
    paradigms: bool = False
    """True to draw a paradigm for every piece."""
    rows: bool = False
    """True to draw indices of rows of the state (`Case.rows`)."""
    uses: tuple[Use, ...] = ("evaluation",)
    """Uses to draw from."""
    scales: tuple[float, ...] = (1.0,)
    """Standard deviations of tokens to draw from."""
    wide: int = 0
    """One case in this many, on average, has a wide mixer, if one fits. 0 draws no wide mixer."""
    options: bool = False
    """True to add a fixed case for every value of every option."""
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)
    """Dtypes of parameters and inputs to draw from."""

    def of(self, traits: Traits) -> "Draw":
        """Return this specification for a mixer with these traits: without a state, every segment starts from None."""
        return self if traits.has_state else replace(self, starts=("none",))

    def fixed_cases(self, traits: Traits) -> list[Case]:
        """Return the cases that always run: long segments in every paradigm, large batches, each dtype, use, scale."""
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
        two_starts = dict.fromkeys((self.starts[-1], self.starts[0]))
        cases += [replace(usual, scale=scale, start=start) for scale in {*self.scales} - {1.0} for start in two_starts]
        heads: list[dict[str, Any]] = [{}, *({"n_heads": number} for number in HEADS)]
        heads = heads[:-1] if max(self.tokens[1], self.fixed) > SHORT else heads
        cases += [replace(usual, wide=True, options=options) for options in heads] if self.wide else []
        cases += [replace(usual, wide=True, lengths=long[0])] if self.wide and self.long and not self.lists else []
        if self.wide and len(self.dtypes) > 1:  # decays of many heads come nearest to 1
            many = replace(usual, wide=True, dtype=self.dtypes[1], options={"n_heads": 12})
            cases = [many, *cases, replace(usual, wide=True, dtype=self.dtypes[-1])]
        if not self.paradigms:
            return cases
        return [replace(case, paradigms=(p,) * len(case.lengths)) for case in cases for p in sorted(traits.paradigms)]

    def typical(self, traits: Traits, options: dict[str, Any]) -> Case:
        """Return the first case, which exercises most of what can be drawn: several tokens and rows, a state."""
        least, most = self.tokens
        declared = sorted(traits.paradigms)
        rows = self.batch_size[1]
        case = Case((max(least, min(most, 7)),) * self.pieces[0], rows, self.starts[-1], use=self.uses[-1])
        if self.paradigms:
            case = replace(case, paradigms=tuple(declared[i % len(declared)] for i in range(self.pieces[0])))
        rearranged = (rows - 1, 0) if self.rows else ()
        return replace(case, rows=rearranged, dtype=self.dtypes[0], scale=self.scales[0], options=options)

    def simpler(self, case: Case) -> Iterator[Case]:
        """Yield cases within this specification that are simpler in one respect; their options may be refused."""
        lengths, options, chunk_size = case.lengths, dict(case.options), case.options.get("chunk_size", math.inf)
        for size in (2, 16):  # a failure at a far boundary of chunks may show at the second boundary of small ones
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
            current = getattr(case, name)  # a fixed case may have a value that is not drawn
            simpler = values[: values.index(current)] if current in values else ()
            yield from (replace(case, **{name: value}) for value in simpler)
        # drop all options at once too: the configuration may refuse some without the others
        yield from (replace(case, options=few) for few in ({}, {"chunk_size": chunk_size}) if {*few} < {*options})
        for name in options:
            yield replace(case, options={other: value for other, value in options.items() if other != name})
        yield from (
            replace(case, options=options | {"chunk_size": size}) for size in (1, 2) if size < chunk_size < math.inf
        )
        yield from (replace(case, paradigms=(paradigm,) * len(lengths)) for paradigm in dict.fromkeys(case.paradigms))
        yield from (replace(case, rows=case.rows[:i]) for i in range(1, len(case.rows)))
        yield replace(case, seed=0)

    def cases(self, traits: Traits, options: Callable[[Random, bool], dict[str, Any]]) -> st.SearchStrategy[Case]:
        """Return the strategy of cases: hypothesis draws one number, and every field is a function of that number.

        With a strategy per field cases would repeat, because hypothesis builds new ones from parts of old ones: among a
        hundred cases there were fewer than a dozen different lengths.

        Args:
            traits: traits of the mixer.
            options: draws changes of the configuration. Its arguments are a random generator and a flag, which
                is False to draw only a chunk size.
        """
        long = [length for length in (*LENGTHS, *BETWEEN) if length <= self.longest]
        few, most = self.pieces

        def case(number: int) -> Case:
            rng, lengths = Random(number), ()
            if number == 0:  # the first number that hypothesis tries; a quick run tries no other
                return self.typical(traits, options(rng, False))
            pieces = _sometimes(rng, self.many, range(most + 1, most + MANY), (few, most))
            while not sum(lengths):
                lengths = tuple(_sometimes(rng, self.long, long, self.tokens) for _ in range(pieces))
            rows = _sometimes(rng, self.crowded, CROWDS, self.batch_size)
            drawn = Case(
                lengths=lengths,
                batch_size=rows,
                start=rng.choice(self.starts),
                paradigms=tuple(rng.choice(sorted(traits.paradigms)) for _ in lengths) if self.paradigms else (),
                rows=tuple(rng.choices(range(rows), k=rng.randint(1, 4))) if self.rows else (),
                use=rng.choice(self.uses),
                scale=rng.choice(self.scales),
                layer=rng.randrange(LAYERS),
                wide=self.wide > 0 and rng.randrange(self.wide) == 0,
                seed=rng.randrange(2**16),
                dtype=rng.choice(self.dtypes),
                options=options(rng, True),
            )
            medium = max(MEDIUM, self.tokens[1])
            return replace(drawn, lengths=tuple(min(length, medium) for length in lengths)) if drawn.wide else drawn

        return st.integers(0, 2**64 - 1).map(case)


def _sometimes(rng: Random, one_in: int, rare: Sequence[int], usual: tuple[int, int]) -> int:
    """Draw one of the rare numbers once in `one_in` times (never if 0), else a number within the usual bounds."""
    return rng.choice(rare) if one_in and rng.randrange(one_in) == 0 else rng.randint(*usual)
