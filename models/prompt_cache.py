"""What a model has read: the state behind some texts, from which any number of continuations can go on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from ..mixers.state import clone, select
from ..registry import SeqmixError
from .language_model import LanguageModel, ModelState

RECENT = 16
"""Last tokens that are kept: the bytes of a character may come apart, and its last ones mean nothing alone."""


@dataclass(frozen=True)
class Reading:
    """N texts, as far as a model has read them. It is a value: whatever goes on from it leaves it as it is."""

    state: ModelState
    """The state behind all tokens of each text but its last one, which is still to be read."""
    recent: Int[Tensor, "N R"]
    """The last tokens of each text, on the CPU; -1 before the first."""
    lengths: Int[Tensor, " N"]
    """Tokens of each text, on the CPU."""

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, rows: Sequence[int]) -> "Reading":
        """The texts of these numbers, in that order, repeated if asked.

        Raises:
            SeqmixError: there is no text of a number.
        """
        for row in rows:
            if not 0 <= row < len(self):
                raise SeqmixError(f"there is no text {row} among the {len(self)} that were read, counted from 0")
        index = torch.tensor(rows, dtype=torch.int64)
        return Reading(select(self.state, index), self.recent[index], self.lengths[index])

    def then(self, prompts: Sequence[Int[Tensor, " T"]]) -> tuple["Reading", list[Int[Tensor, " T+1"]]]:
        """The texts that go on, one for each prompt, and what each is still to read: its last token, and the prompt.

        Args:
            prompts: one for each text; or several for one text, or one for all; none to go on with nothing more. A
                prompt may be empty.

        Raises:
            SeqmixError: there are several texts, and another number of prompts.
        """
        given = list(prompts) or [torch.tensor([], dtype=torch.int64)]
        if 1 not in (len(self), len(given)) and len(self) != len(given):
            raise SeqmixError(
                f"{len(self)} texts were read, and {len(given)} prompts given: give one for each text, or one for all"
            )
        count = max(len(self), len(given))
        given = given * (count // len(given))
        reading = self if len(self) == count else self.select([0] * count)
        return reading, [torch.cat((last[-1:], new.cpu())) for last, new in zip(reading.recent, given, strict=True)]

    def room_for(self, model: LanguageModel, max_length: int | None) -> ModelState:
        """A copy of the state with room for `max_length` tokens in all, or none to spare where that is None."""
        # decoding may write into a state, and a mixer that has no use for room returns the one it was given
        return clone(model.resize_state(self.state, max_length))


def reading_of(state: ModelState, tokens: Sequence[Int[Tensor, " T"]], behind: Reading | None = None) -> Reading:
    """The reading of some texts, from the state behind all their tokens but the last, and the tokens.

    Args:
        state: the state, N rows.
        tokens: of each text, at least one; behind a reading they begin with its last one, as `Reading.then` gives them.
        behind: what was read before, N texts; None means nothing.
    """
    before = torch.full((len(tokens), RECENT), -1) if behind is None else behind.recent[:, :-1]
    recent = torch.stack([torch.cat((old, new.cpu()))[-RECENT:] for old, new in zip(before, tokens, strict=True)])
    lengths = torch.tensor([len(new) for new in tokens]) + (0 if behind is None else behind.lengths - 1)
    return Reading(state, recent, lengths)
