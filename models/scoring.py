"""Scoring: log-likelihoods of continuations, and of whole texts.

A context that several continuations share is processed once, and all of them start from its state. A text of any length
is processed in segments that hand the state on: in constant memory where states have a constant size.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..mixers import Paradigm
from ..mixers.state import select
from ..registry import SeqmixError
from .language_model import LanguageModel, ModelState
from .loss import IGNORED
from .prefill import SEGMENT, prefill


class Score(NamedTuple):
    """How likely tokens are."""

    log_likelihood: float
    """In nats, summed over the tokens."""
    greedy: bool
    """Whether each token is the most probable one at its place."""


class Scorer:
    """Scores tokens by a model.

    Args:
        model: the model; its training mode is the caller's.
        batch_size: contexts, continuations or texts at once.
    """

    def __init__(self, model: LanguageModel, *, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise SeqmixError(f"the batch size must be at least 1, and is {batch_size}")
        self.model = model
        self.batch_size = batch_size
        self.forwarded_tokens = 0
        """Tokens that the model has processed, without padding."""

    @torch.no_grad()
    def continuations(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """The score of each continuation after its context; each distinct context is processed once.

        Args:
            pairs: tokens of the context and of the continuation, at least one of each.

        Raises:
            SeqmixError: a context or a continuation is empty.
        """
        if not all(context and continuation for context, continuation in pairs):
            raise SeqmixError("a context or a continuation has no tokens: give at least one of each")
        scores: dict[int, Score] = {}
        sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (context, _) in enumerate(pairs):
            sharing[tuple(context)].append(index)
        for contexts in self._batches(sorted(sharing, key=len, reverse=True)):
            logits, state = prefill(self.model, [torch.tensor(context) for context in contexts])
            self.forwarded_tokens += sum(map(len, contexts))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            asked = [(row, index) for row, context in enumerate(contexts) for index in sharing[context]]
            for part in self._batches(sorted(asked, key=lambda at: len(pairs[at[1]][1]), reverse=True)):
                rows = torch.tensor([row for row, _ in part], device=logits.device)
                tokens = [torch.tensor(pairs[index][1]) for _, index in part]
                first = torch.stack([row[0] for row in tokens]).to(logits.device)
                found, greedy = self._after_first(tokens, select(state, rows))
                found += logits.log_softmax(-1)[rows, first].double()
                greedy &= logits.argmax(-1)[rows] == first
                places = (index for _, index in part)
                scores |= dict(zip(places, map(Score, found.tolist(), greedy.tolist()), strict=True))
        return [scores[index] for index in range(len(pairs))]

    @torch.no_grad()
    def texts(self, texts: Sequence[Int[Tensor, " T"]]) -> list[Score]:
        """The score of each text, all its tokens but the first; of any length."""
        scores: dict[int, Score] = {}
        for part in self._batches(sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)):
            found, greedy = self._after_first([texts[index] for index in part], None)
            scores |= dict(zip(part, map(Score, found.tolist(), greedy.tolist()), strict=True))
        return [scores[index] for index in range(len(texts))]

    def _after_first(
        self, rows: Sequence[Int[Tensor, " T"]], state: ModelState | None
    ) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
        """Of each row, from a state: the log-likelihood of its tokens after the first, and whether it is greedy."""
        # padded at the end: by causality it changes nothing before
        inputs = pad_sequence([row[:-1] for row in rows], batch_first=True).to(self.model.device)
        targets = pad_sequence([row[1:] for row in rows], True, IGNORED).to(self.model.device)
        total = torch.zeros(len(rows), dtype=torch.float64, device=self.model.device)
        greedy = torch.ones(len(rows), dtype=torch.bool, device=self.model.device)
        constant = all(block.mixer.traits.state == "constant" for block in self.model.blocks)
        size = max(SEGMENT // len(rows), 1) if constant else max(inputs.shape[1], 1)
        for start in range(0, inputs.shape[1], size):
            part = inputs[:, start : start + size]
            wanted = targets[:, start : start + size]
            # the texts have any length, and blocks may have been compiled for those of training
            with torch.compiler.set_stance("force_eager"):
                output = self.model(
                    part,
                    state,
                    targets=wanted,
                    reduction="none",
                    paradigm=self.model.prefer(Paradigm.CHUNKWISE, Paradigm.PARALLEL, from_state=state is not None),
                    return_state=start + size < inputs.shape[1],
                    return_predictions=True,
                )
            state = output.state
            asked = wanted != IGNORED
            total -= output.loss.double().sum(1)
            greedy &= torch.ones_like(asked).masked_scatter(asked, output.predictions == wanted[asked]).all(1)
        self.forwarded_tokens += sum(len(row) - 1 for row in rows)
        return total, greedy

    def _batches(self, items: list) -> list[list]:
        return [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
