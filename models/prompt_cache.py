"""The prompt cache: the state after a processed prefix, from which any number of continuations start."""

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
"""Last tokens that are saved: they may be half of the bytes of a character, which decode only with the rest."""


@dataclass(frozen=True)
class PromptCache:
    """The state of a model after N texts. It is a value: continuations do not change it."""

    state: ModelState | None
    """The state after all tokens of each text but the last, which the next call processes; None before any token."""
    recent: Int[Tensor, "N R"]
    """The last tokens of each text, on the CPU; -1 before the first."""
    lengths: Int[Tensor, " N"]
    """Tokens of each text, on the CPU."""

    @classmethod
    def empty(cls, count: int) -> "PromptCache":
        """The cache of `count` empty texts."""
        return cls(None, torch.full((count, RECENT), -1), torch.zeros(count, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, rows: Sequence[int]) -> "PromptCache":
        """The texts of these rows, in that order, with repetition.

        Raises:
            SeqmixError: a row is out of range.
        """
        for row in rows:
            if not 0 <= row < len(self):
                raise SeqmixError(f"there is no text {row} in the prompt cache: it has {len(self)}, counted from 0")
        index = torch.tensor(rows, dtype=torch.int64)
        state = None if self.state is None else select(self.state, index)
        return PromptCache(state, self.recent[index], self.lengths[index])

    def broadcast(self, prompts: Sequence[Int[Tensor, " T"]]) -> tuple["PromptCache", list[Int[Tensor, " T+1"]]]:
        """The cached texts, one per prompt, and the tokens to process next: the last cached token, and the prompt.

        Args:
            prompts: one per text, several for one text, or one for all; none to continue without. A prompt may be
                empty.

        Raises:
            SeqmixError: there are several texts, and another number of prompts than one.
        """
        given = list(prompts) or [torch.tensor([], dtype=torch.int64)]
        if 1 not in (len(self), len(given)) and len(self) != len(given):
            raise SeqmixError(
                f"the prompt cache has {len(self)} texts, and {len(given)} prompts were given: give one per text, or "
                "one for all"
            )
        count = max(len(self), len(given))
        given = given * (count // len(given))
        cache = self if len(self) == count else self.select([0] * count)
        last = [recent[-1:][recent[-1:] >= 0] for recent in cache.recent]
        return cache, [torch.cat((token, new.cpu())) for token, new in zip(last, given, strict=True)]

    def prefill(
        self, model: LanguageModel, texts: Sequence[Int[Tensor, " T"]], *, more: int
    ) -> tuple[Float[Tensor, "N vocab"], ModelState]:
        """Prefill the tokens of `broadcast`: logits of the next tokens, and a state with room for `more` tokens."""
        room = max(map(len, texts), default=0) + more + max(int(self.lengths.max()) - 1, 0)
        state = None if self.state is None else self.resized_state(model, room)
        return prefill(model, texts, state=state, max_length=room)

    def extend(self, state: ModelState | None, texts: Sequence[Int[Tensor, " T"]]) -> "PromptCache":
        """The cache after the tokens of `broadcast`, from the state after all of them but the last."""
        parts = zip(self.recent[:, :-1], texts, strict=True)
        recent = torch.stack([torch.cat((old, new.cpu()))[-RECENT:] for old, new in parts])
        lengths = (self.lengths - 1).clamp(min=0) + torch.tensor([len(new) for new in texts])
        return PromptCache(state, recent, lengths)

    def resized_state(self, model: LanguageModel, max_length: int | None) -> ModelState:
        """A copy of the state with a capacity of `max_length` tokens; without spare room for None."""
        if self.state is None:
            return model.init_state(len(self), max_length=max_length)
        # decoding may write into a state, and a mixer whose state has a fixed size returns the given one
        return clone(model.resize_state(self.state, max_length))


@torch.no_grad()
def cache_tokens(
    model: LanguageModel, prompts: Sequence[Int[Tensor, " T"]], *, after: PromptCache | None = None
) -> PromptCache:
    """Prefill prompts without generating: a prefix that many continuations share.

    Args:
        model: the model.
        prompts: N prompts of at least two tokens; the continuation processes the last one.
        after: the prompt cache of the prefix, as `PromptCache.broadcast` takes it; a prompt may then have one token.

    Raises:
        SeqmixError: there is no prompt, or a prompt is too short.
    """
    before, texts = (PromptCache.empty(1) if after is None else after).broadcast(prompts)
    if any(len(text) == 1 for text in texts):
        raise SeqmixError("a prompt to cache needs at least two tokens: the continuation processes the last one")
    _, state = before.prefill(model, [text[:-1] for text in texts], more=0)
    return before.extend(state, texts)
