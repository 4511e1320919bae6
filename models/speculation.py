"""Speculative decoding: one call verifies several drafted tokens; the text is that of plain decoding.

    segment     a text's certain tokens that its state does not include yet, then drafted ones; BLOCK tokens at most
    accepted    guesses up to the first that differs from the token that the model samples there (arXiv 2211.17192)
    state       after the segment, if all of its guesses were accepted; otherwise the one before the segment stays

Since a state is a value, a wrong guess costs no copy and no second pass: the next segment begins with the certain
tokens again, and a segment of up to BLOCK tokens costs hardly more than one of two. This holds for every mixer.

A token is sampled from the model's own logits with the random numbers of its position (`Sampler`), and a guess is kept
if it equals that token. So it is accepted with the probability that the model gives it, as in rejection sampling, and
the text is the same as without guesses: greedy or sampled, up to rounding of the logits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..mixers import Paradigm
from ..mixers.base.state import to_dict, where
from ..ops.runtime.memo import Memo
from ..registry import SeqmixError, nearest_hint
from .compiling import compiled_for, rows_as_sums
from .drafting import Draft, ModelDraft, NgramDraft
from .language_model import LanguageModel, ModelState
from .sampling import Sampler
from .subword import have_same_tokens

BLOCK = 8
"""Default number of tokens in a segment. Matrix products read their weights once for up to eight rows at about the
price of one."""


@dataclass
class Speculation:
    """Settings of speculative decoding, and counts of what it did.

    Raises:
        SeqmixError: a value is out of range.
    """

    draft: Literal["ngram"] | LanguageModel | Draft = "ngram"
    """Source of the guesses: `ngram` for the text so far, or a smaller model with the same tokenizer."""
    block: int = BLOCK
    """Maximum number of tokens that one call reads, certain and drafted ones together; at least 2."""
    calls: int = field(default=0, init=False)
    """Number of calls of the model after prefill."""
    segments: int = field(default=0, init=False)
    """Number of segments that these calls read: one for each text that had not ended."""
    drafted: int = field(default=0, init=False)
    """Number of drafted tokens that were verified."""
    accepted: int = field(default=0, init=False)
    """Number of drafted tokens that were right."""

    def __post_init__(self) -> None:
        if self.block < 2:
            raise SeqmixError(f"block must be at least 2 (one certain token and one guess), got {self.block}")
        if isinstance(self.draft, str) and self.draft != "ngram":
            raise SeqmixError(
                f"unknown draft {self.draft!r}{nearest_hint(self.draft, ['ngram'])}: pass ngram or a model"
            )

    def start_draft(self, model: LanguageModel) -> Draft:
        """Return the guesser for texts of `model`.

        Raises:
            SeqmixError: the smaller model has another vocabulary or tokenizer.
        """
        if isinstance(self.draft, Draft):
            return self.draft
        if not isinstance(self.draft, LanguageModel):
            return NgramDraft()
        if self.draft.config.vocab_size != model.config.vocab_size:
            raise SeqmixError(
                f"the draft model needs the vocabulary of the model, {model.config.vocab_size} tokens, got "
                f"{self.draft.config.vocab_size}"
            )
        ours, theirs = model.tokenizer, self.draft.tokenizer
        if ours is not None and theirs is not None and not have_same_tokens(ours, theirs):
            raise SeqmixError(
                "the draft model needs the tokenizer of the model, got another one with as many tokens: train it with "
                "the model's tokenizer (data.tokenizer), or draft by ngram"
            )
        return ModelDraft(self.draft.to(model.device))


class Speculator:
    """A decoder of N texts that verifies guesses.

    Args:
        model: the model.
        state: its state after each text; not donated.
        texts: tokens of each text.
        first: token that follows each text, which the state does not include.
        sampler: sampler of the tokens.
        speculation: the settings; its counts grow.
        max_new_tokens: maximum number of tokens of each text, `first` included.
        vocab_size: only tokens below it are sampled; None for all.
        compiled: True to compile the call that verifies.
    """

    def __init__(
        self,
        model: LanguageModel,
        state: ModelState,
        texts: Sequence[Sequence[int]],
        first: Sequence[int],
        sampler: Sampler,
        speculation: Speculation,
        *,
        max_new_tokens: int,
        vocab_size: int | None,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.state = state
        self.speculation = speculation
        self.new_tokens = [[token] for token in first]
        """Tokens of each text so far."""
        self._pending = [[token] for token in first]
        self._sampler = sampler
        self._max_new_tokens = max_new_tokens
        self._vocab_size = vocab_size
        self._compiled = compiled
        self._verify: Any = compiled_for(model, verify, backend=rows_as_sums) if compiled else verify
        self._memo = None if compiled else Memo()
        self._draft = speculation.start_draft(model)
        self._draft.start(texts, sampler, more=max_new_tokens + speculation.block, vocab_size=vocab_size)
        for row, token in enumerate(first):
            self._draft.extend(row, [token])

    def steps(self) -> Iterator[list[int]]:
        """Yield the next token of every text until each has `max_new_tokens`."""
        for count in range(self._max_new_tokens):
            while any(len(tokens) <= count for tokens in self.new_tokens):
                self.advance()
            yield [tokens[count] for tokens in self.new_tokens]

    @torch.no_grad()
    def advance(self) -> None:
        """Verify one segment of each text, which gives every text that has not ended at least one token."""
        block = self.speculation.block
        active = [row for row, tokens in enumerate(self.new_tokens) if len(tokens) < self._max_new_tokens]
        room = [0] * len(self._pending)
        for row in active:
            room[row] = min(block - len(self._pending[row]), self._max_new_tokens - len(self.new_tokens[row]) - 1)
        guesses = self._draft.propose(room)
        segments = [pending + guess for pending, guess in zip(self._pending, guesses, strict=True)]
        length = block if self._compiled else max(len(segments[row]) for row in active)
        tokens = torch.tensor([(segment + [0] * length)[:length] for segment in segments], device=self.model.device)
        logits, after = self._verify(self.model, tokens, self.state, memo=self._memo)
        self.speculation.calls += 1
        commits = [False] * len(segments)  # a text that is complete keeps its state
        for row in active:
            certain = len(self._pending[row])
            new = self._verified(row, guesses[row], logits[row, certain - 1 :])
            is_whole = certain + len(new) - 1 == length  # the state after the segment includes certain tokens only
            commits[row] = is_whole
            self._pending[row] = new[-1:] if is_whole else self._pending[row] + new
        self.state = _chosen_rows(commits, after, self.state)

    def _verified(self, row: int, guess: Sequence[int], logits: Tensor) -> list[int]:
        """Return a text's new tokens, the guesses that are right and one more, from the logits before each of them."""
        places = [(row, ahead) for ahead in range(len(guess) + 1)]
        sampled = self._sampler.tokens_at(logits[: len(places), : self._vocab_size], places).tolist()
        accepted = next((i for i, token in enumerate(guess) if token != sampled[i]), len(guess))
        new = sampled[: accepted + 1]
        self._sampler.advance(row, len(new))
        self._draft.extend(row, new)
        self.new_tokens[row] += new
        self.speculation.segments += 1
        self.speculation.drafted += len(guess)
        self.speculation.accepted += accepted
        return new


def verify(
    model: LanguageModel, tokens: Tensor, state: ModelState, *, memo: Memo | None = None
) -> tuple[Tensor, ModelState]:
    """Read a segment [N T]; return the logits after each token [N T vocab], and the state after the segment."""
    paradigms = model.prefer(Paradigm.RECURRENT, Paradigm.CHUNKWISE, from_state=True)
    output = model(tokens, state, paradigm=paradigms, return_state=True, memo=memo)
    return output.logits, output.state


def _chosen_rows(commits: Sequence[bool], after: ModelState, before: ModelState) -> ModelState:
    """Return the state whose rows are those of `after` where `commits` is True, else those of `before`."""
    if all(commits):
        return after
    if not any(commits):
        return before
    return where(torch.tensor(commits, device=next(iter(to_dict(after).values())).device), after, before)
