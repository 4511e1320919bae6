"""The prompt cache: the state after some texts, from which any number of continuations can go on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..mixers.state import clone, select
from ..registry import SeqmixError
from .language_model import LanguageModel, ModelState
from .prefill import prefill

RECENT = 16
"""Last tokens that are kept: the bytes of a character may come apart, and its last ones mean nothing alone."""


@dataclass(frozen=True)
class PromptCache:
    """N texts, as far as a model has read them. It is a value: whatever goes on from it leaves it as it is."""

    state: ModelState | None
    """The state after all tokens of each text but its last one, which is still to be read; None of nothing."""
    recent: Int[Tensor, "N R"]
    """The last tokens of each text, on the CPU; -1 before the first."""
    lengths: Int[Tensor, " N"]
    """Tokens of each text, on the CPU."""

    @classmethod
    def empty(cls, count: int) -> "PromptCache":
        """That of texts which have not begun."""
        return cls(None, torch.full((count, RECENT), -1), torch.zeros(count, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, rows: Sequence[int]) -> "PromptCache":
        """The texts of these numbers, in that order, repeated if asked.

        Raises:
            SeqmixError: there is no text of a number.
        """
        for row in rows:
            if not 0 <= row < len(self):
                raise SeqmixError(f"there is no text {row} among the {len(self)} that were read, counted from 0")
        index = torch.tensor(rows, dtype=torch.int64)
        state = None if self.state is None else select(self.state, index)
        return PromptCache(state, self.recent[index], self.lengths[index])

    def broadcast(self, prompts: Sequence[Int[Tensor, " T"]]) -> tuple["PromptCache", list[Int[Tensor, " T+1"]]]:
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
        cache = self if len(self) == count else self.select([0] * count)
        last = [recent[-1:][recent[-1:] >= 0] for recent in cache.recent]
        return cache, [torch.cat((token, new.cpu())) for token, new in zip(last, given, strict=True)]

    def prefill(
        self, model: LanguageModel, texts: Sequence[Int[Tensor, " T"]], *, more: int
    ) -> tuple[Float[Tensor, "N vocab"], ModelState]:
        """Read texts of `broadcast`: the logits of each one's next token, and a state with room for `more` tokens."""
        room = max(map(len, texts), default=0) + more + max(int(self.lengths.max()) - 1, 0)
        state = None if self.state is None else self.resized_state(model, room)
        return prefill(model, texts, state=state, max_length=room)

    def extend(self, state: ModelState, texts: Sequence[Int[Tensor, " T"]]) -> "PromptCache":
        """The cache of texts as `broadcast` gives them, from the state after all their tokens but the last."""
        parts = zip(self.recent[:, :-1], texts, strict=True)
        recent = torch.stack([torch.cat((old, new.cpu()))[-RECENT:] for old, new in parts])
        lengths = (self.lengths - 1).clamp(min=0) + torch.tensor([len(new) for new in texts])
        return PromptCache(state, recent, lengths)

    def resized_state(self, model: LanguageModel, max_length: int | None) -> ModelState:
        """A copy of the state with room for `max_length` tokens in all, or no room to spare where that is None."""
        if self.state is None:
            return model.init_state(len(self), max_length=max_length)
        # decoding may write into a state, and a mixer that has no use for room returns the one it was given
        return clone(model.resize_state(self.state, max_length))


@torch.no_grad()
def cache_tokens(
    model: LanguageModel, prompts: Sequence[Int[Tensor, " T"]], *, after: PromptCache | None = None
) -> PromptCache:
    """Read prompts and generate nothing: what many continuations may go on from.

    Args:
        model: the model.
        prompts: N prompts of at least two tokens, of which the last is read by whatever goes on.
        after: what was read before the prompts, as `PromptCache.broadcast` takes them, which may then have one token.

    Raises:
        SeqmixError: there is no prompt, or one that is too short.
    """
    before, texts = (PromptCache.empty(1) if after is None else after).broadcast(prompts)
    if any(len(text) == 1 for text in texts):
        raise SeqmixError("a prompt has no token to read: the last one is read by what goes on after it")
    _, state = before.prefill(model, [text[:-1] for text in texts], more=0)
    return before.extend(state, texts)
