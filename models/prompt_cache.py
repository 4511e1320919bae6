"""The prompt cache: the state after a processed prefix, from which any number of continuations can start."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..mixers.base.state import clone, select
from ..registry import SeqmixError
from .language_model import LanguageModel, ModelState
from .prefill import prefill

RECENT = 16
"""Number of last tokens that a cache keeps of each text: they may end within a character, which the next tokens
complete."""


@dataclass(frozen=True)
class PromptCache:
    """State of a model after each of N texts, from which continuations can start; continuations do not change it."""

    state: ModelState | None
    """State after all tokens of each text except the last one, which the next call processes; None for empty texts."""
    recent: Int[Tensor, "N R"]
    """Last R = `RECENT` tokens of each text, on the CPU; -1 in front of shorter texts."""
    lengths: Int[Tensor, " N"]
    """Number of tokens in each text, on the CPU."""

    @classmethod
    def empty(cls, count: int) -> "PromptCache":
        """Return the cache of `count` empty texts."""
        return cls(None, torch.full((count, RECENT), -1), torch.zeros(count, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, rows: Sequence[int]) -> "PromptCache":
        """Return the cache of the texts in these rows, in this order; rows may repeat.

        Raises:
            SeqmixError: a row is out of range.
        """
        for row in rows:
            if not 0 <= row < len(self):
                raise SeqmixError(f"expected rows of the prompt cache from 0 to {len(self) - 1}, got {row}")
        index = torch.tensor(rows, dtype=torch.int64)
        state = None if self.state is None else select(self.state, index)
        return PromptCache(state, self.recent[index], self.lengths[index])

    def broadcast(self, prompts: Sequence[Int[Tensor, " T"]]) -> tuple["PromptCache", list[Int[Tensor, " T+1"]]]:
        """Match cached texts and prompts; return one cached text per prompt, and the tokens to process next.

        The tokens of each pair are the last cached token, which the state does not include yet, and the prompt.

        Args:
            prompts: one prompt per text, several prompts for one text, or one prompt for all texts. Without prompts,
                the texts continue as they are. A prompt may be empty.

        Raises:
            SeqmixError: the numbers of texts and prompts are different, and neither is one.
        """
        prompts = list(prompts) or [torch.tensor([], dtype=torch.int64)]
        if 1 not in (len(self), len(prompts)) and len(self) != len(prompts):
            raise SeqmixError(
                f"expected one prompt for each of the {len(self)} texts in the prompt cache, or one for all, got "
                f"{len(prompts)}"
            )
        count = max(len(self), len(prompts))
        prompts = prompts * (count // len(prompts))
        cache = self if len(self) == count else self.select([0] * count)
        last = [recent[-1:][recent[-1:] >= 0] for recent in cache.recent]
        return cache, [torch.cat((token, prompt.cpu())) for token, prompt in zip(last, prompts, strict=True)]

    def recent_tokens(self) -> list[list[int]]:
        """Return the last tokens of each text, without the very last one, which the next call processes."""
        return [[token for token in recent if token >= 0] for recent in self.recent[:, :-1].tolist()]

    def prefill(
        self, model: LanguageModel, texts: Sequence[Int[Tensor, " T"]], *, more: int
    ) -> tuple[Float[Tensor, "N vocab"], ModelState]:
        """Prefill tokens that `broadcast` returned; return the logits of the next token of each text, and the state.

        The state has room for `more` further tokens.
        """
        max_length = max(map(len, texts), default=0) + more + max(int(self.lengths.max()) - 1, 0)
        state = None if self.state is None else self.resized_state(model, max_length)
        return prefill(model, texts, state=state, max_length=max_length)

    def extend(self, state: ModelState | None, texts: Sequence[Int[Tensor, " T"]]) -> "PromptCache":
        """Return the cache after the tokens `texts`, which begin with those that `broadcast` returned.

        `state` is the state after all of them except the last token of each text.
        """
        parts = zip(self.recent[:, :-1], texts, strict=True)
        recent = torch.stack([torch.cat((old, new.cpu()))[-RECENT:] for old, new in parts])
        lengths = (self.lengths - 1).clamp(min=0) + torch.tensor([len(new) for new in texts])
        return PromptCache(state, recent, lengths)

    def resized_state(self, model: LanguageModel, max_length: int | None) -> ModelState:
        """Return a copy of the state with a capacity of `max_length` tokens, prefix included; None for no free room."""
        if self.state is None:
            return model.init_state(len(self), max_length=max_length)
        # clone: decoding may write into the state, and `resize_state` does not copy a state of fixed size
        return clone(model.resize_state(self.state, max_length))


@torch.no_grad()
def cache_tokens(
    model: LanguageModel, prompts: Sequence[Int[Tensor, " T"]], *, after: PromptCache | None = None
) -> PromptCache:
    """Prefill prompts without generating; return their cache, a prefix that many continuations can share.

    Args:
        model: the model.
        prompts: N prompts of at least two tokens. The last token is not part of the cached state: the call that
            continues the prompt processes it.
        after: the prompt cache of a prefix, combined with the prompts as in `PromptCache.broadcast`; a prompt may then
            have a single token.

    Raises:
        SeqmixError: `prompts` is empty, or a prompt is too short.
    """
    before, texts = (PromptCache.empty(1) if after is None else after).broadcast(prompts)
    if any(len(text) == 1 for text in texts):
        raise SeqmixError(
            "a cached prompt needs at least two tokens, got one: its last token is not cached, but processed by the "
            "call that continues it"
        )
    _, state = before.prefill(model, [text[:-1] for text in texts], more=0)
    return before.extend(state, texts)
