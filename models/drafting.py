"""Drafts of speculative decoding: guesses of the next tokens, by n-grams of the text so far or by a smaller model."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from ..mixers.base.state import select
from .decoding import decode_step
from .language_model import LanguageModel, ModelState
from .prefill import prefill
from .sampling import Sampler

NGRAMS = (12, 8, 6, 4, 3)
"""Lengths in tokens of the n-grams that are looked up, longest first. Shorter ones guess wrong more often than not."""


class Draft(ABC):
    """A guesser of the next tokens of N texts."""

    @abstractmethod
    def start(self, texts: Sequence[Sequence[int]], sampler: Sampler, *, more: int, vocab_size: int | None) -> None:
        """Begin with N texts.

        Args:
            texts: tokens of each text.
            sampler: sampler of the model that verifies the guesses.
            more: maximum number of tokens that will be added to a text.
            vocab_size: only tokens below it are sampled; None for all.
        """

    @abstractmethod
    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """Add tokens to a text."""

    @abstractmethod
    def propose(self, counts: Sequence[int]) -> list[list[int]]:
        """Return a guess of the next tokens of each text: at most counts[row], possibly none."""


class NgramDraft(Draft):
    """Guesses that the text goes on as it did after the last occurrence of its last tokens (prompt lookup).

    It costs almost nothing, and is right where a text repeats itself or its prompt, as source code does.
    """

    def start(self, texts: Sequence[Sequence[int]], sampler: Sampler, *, more: int, vocab_size: int | None) -> None:
        """Index the n-grams of the texts."""
        del sampler, more, vocab_size
        self._texts: list[list[int]] = [[] for _ in texts]
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in texts]
        for row, text in enumerate(texts):
            self.extend(row, text)

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """Index the n-grams that end with these tokens."""
        text, ends = self._texts[row], self._ends[row]
        for token in tokens:
            for n in NGRAMS:
                if len(text) >= n:
                    ends[tuple(text[-n:])] = len(text)  # this token follows the n-gram
            text.append(token)

    def propose(self, counts: Sequence[int]) -> list[list[int]]:
        """Return what followed the last n-gram of each text where it last occurred."""
        return [self._guess(row, count) for row, count in enumerate(counts)]

    def _guess(self, row: int, count: int) -> list[int]:
        text = self._texts[row]
        for n in NGRAMS:
            if len(text) >= n and (end := self._ends[row].get(tuple(text[-n:]))) is not None:
                follows = text[end : end + count]
                return [follows[i % len(follows)] for i in range(count)]  # what repeats itself goes on doing so
        return []


class ModelDraft(Draft):
    """Guesses of a smaller model, decoded token by token.

    Args:
        model: the smaller model, with the tokenizer of the model that verifies its guesses.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def start(self, texts: Sequence[Sequence[int]], sampler: Sampler, *, more: int, vocab_size: int | None) -> None:
        """Begin with N texts, which the first proposal prefills."""
        self._sampler = sampler
        self._vocab_size = vocab_size
        self._max_length = max(map(len, texts)) + more
        self._unread = [list(text) for text in texts]
        self._rows = list(range(len(texts)))
        self._state: ModelState | None = None

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """Note tokens that the next proposal reads."""
        self._unread[row].extend(tokens)

    def propose(self, counts: Sequence[int]) -> list[list[int]]:
        """Read the new tokens of each text, and decode the guesses from there."""
        guesses: list[list[int]] = [[] for _ in counts]
        active = [row for row in self._rows if self._unread[row]]  # a text that has ended gets no more tokens
        depth = max((counts[row] for row in active), default=0)
        if depth == 0:
            return guesses
        if self._state is not None and active != self._rows:
            self._state = select(self._state, torch.tensor([self._rows.index(row) for row in active]))
        self._rows = active
        # the state after certain tokens is kept; the guesses go on from it and are forgotten
        unread = [torch.tensor(self._unread[row]) for row in active]
        logits, self._state = prefill(self.model, unread, state=self._state, max_length=self._max_length)
        state = self._state
        for row in active:
            self._unread[row] = []
        for ahead in range(depth):
            guess = self._sampler.tokens_at(logits[:, : self._vocab_size], [(row, ahead) for row in active])
            for row, token in zip(active, guess.tolist(), strict=True):
                guesses[row].append(token)
            if ahead + 1 < depth:
                logits, state = decode_step(self.model, guess, state)
        return [guess[:count] for guess, count in zip(guesses, counts, strict=True)]
