"""Scoring: log-likelihoods of continuations and of whole texts.

A context that several continuations share is processed once, and all of them start from its state. A text of any length
is processed in segments, each from the state of the previous one: in constant memory if states have a constant size.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..mixers import Paradigm
from ..mixers.base.state import select
from ..registry import SeqmixError
from .language_model import LanguageModel, ModelState
from .loss import IGNORED
from .prefill import SEGMENT, prefill


class Score(NamedTuple):
    """Log-likelihood of a sequence of tokens, and whether greedy decoding would generate them."""

    log_likelihood: float
    """Log-likelihood in nats, summed over the tokens."""
    greedy: bool
    """True if every token is the most probable one at its position."""


class Scorer:
    """Scorer of continuations and texts by a model.

    Args:
        model: the model; the caller sets its training mode.
        batch_size: number of contexts, continuations or texts that are processed at once.
    """

    def __init__(self, model: LanguageModel, *, batch_size: int = 16) -> None:
        if batch_size < 1:
            raise SeqmixError(f"the batch size must be at least 1, got {batch_size}")
        self.model = model
        self.batch_size = batch_size
        self.forwarded_tokens = 0
        """Number of tokens that the model has processed, padding excluded."""

    @torch.no_grad()
    def continuations(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """Return the score of each continuation after its context; each distinct context is processed once.

        Args:
            pairs: the tokens of a context and of its continuation, at least one token each.

        Raises:
            SeqmixError: a context or a continuation is empty.
        """
        if not all(context and continuation for context, continuation in pairs):
            raise SeqmixError("contexts and continuations need at least one token each, got an empty one")
        scores: dict[int, Score] = {}
        pairs_by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (context, _) in enumerate(pairs):
            pairs_by_context[tuple(context)].append(index)
        for contexts in self._batches(sorted(pairs_by_context, key=len, reverse=True)):
            logits, state = prefill(self.model, [torch.tensor(context) for context in contexts])
            self.forwarded_tokens += sum(map(len, contexts))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            jobs = [(row, index) for row, context in enumerate(contexts) for index in pairs_by_context[context]]
            for batch in self._batches(sorted(jobs, key=lambda job: len(pairs[job[1]][1]), reverse=True)):
                rows = torch.tensor([row for row, _ in batch], device=logits.device)
                tokens = [torch.tensor(pairs[index][1]) for _, index in batch]
                first = torch.stack([row[0] for row in tokens]).to(logits.device)
                log_likelihoods, greedy = self._after_first(tokens, select(state, rows))
                log_likelihoods += logits.log_softmax(-1)[rows, first].double()
                greedy &= logits.argmax(-1)[rows] == first
                indices = (index for _, index in batch)
                scores |= dict(zip(indices, map(Score, log_likelihoods.tolist(), greedy.tolist()), strict=True))
        return [scores[index] for index in range(len(pairs))]

    @torch.no_grad()
    def texts(self, texts: Sequence[Int[Tensor, " T"]]) -> list[Score]:
        """Return the score of each text, of any length; its first token is not scored."""
        scores: dict[int, Score] = {}
        for batch in self._batches(sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)):
            log_likelihoods, greedy = self._after_first([texts[index] for index in batch], None)
            scores |= dict(zip(batch, map(Score, log_likelihoods.tolist(), greedy.tolist()), strict=True))
        return [scores[index] for index in range(len(texts))]

    def _after_first(
        self, rows: Sequence[Int[Tensor, " T"]], state: ModelState | None
    ) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"]]:
        """Score the tokens of each row after its first one, starting from a state; None for no prefix.

        Returns:
            Log-likelihoods in nats, and True for each row whose tokens are all the most probable ones.
        """
        # by causality, padding at the end does not change earlier tokens
        inputs = pad_sequence([row[:-1] for row in rows], batch_first=True).to(self.model.device)
        targets = pad_sequence([row[1:] for row in rows], True, IGNORED).to(self.model.device)
        total = torch.zeros(len(rows), dtype=torch.float64, device=self.model.device)
        greedy = torch.ones(len(rows), dtype=torch.bool, device=self.model.device)
        has_constant_size = all(block.mixer.traits.state == "constant" for block in self.model.blocks)
        size = max(SEGMENT // len(rows), 1) if has_constant_size else max(inputs.shape[1], 1)
        for start in range(0, inputs.shape[1], size):
            part = inputs[:, start : start + size]
            wanted = targets[:, start : start + size]
            # blocks compiled for the length of training would be recompiled for the texts' lengths
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
            has_target = wanted != IGNORED
            total -= output.loss.double().sum(1)
            correct = output.predictions == wanted[has_target]
            greedy &= torch.ones_like(has_target).masked_scatter(has_target, correct).all(1)
        self.forwarded_tokens += sum(len(row) - 1 for row in rows)
        return total, greedy

    def _batches(self, items: list) -> list[list]:
        return [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
