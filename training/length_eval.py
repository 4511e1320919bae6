"""A trained model on texts of other lengths than it has learned from.

Two questions with two answers. By length: how does the loss go on after as many tokens as a training sequence had,
where every sequence starts from nothing? By context: how much do the same tokens gain from more text before them?
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise, takewhile
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..data import Batch
from ..data.kinds.text import Text
from ..mixers import Paradigm
from ..models import IGNORED, LanguageModel
from ..registry import SeqmixError
from .config import RunConfig

TIMES = (1, 2, 4, 8, 16)
"""Lengths that are measured, in sequences of training."""
AT_ONCE = 4096
"""Tokens of a batch, at least one sequence."""


@dataclass(frozen=True)
class PositionLoss:
    """Nats a token at the positions start to stop - 1 of a sequence."""

    start: int
    stop: int
    tokens: int
    """Measured."""
    losses: dict[Paradigm, float]


@dataclass(frozen=True)
class LengthLoss:
    """Nats a token of sequences of one length."""

    length: int
    tokens: int
    """Measured."""
    losses: dict[Paradigm, float]
    positions: tuple[PositionLoss, ...]
    difference: float
    """The largest difference of one token's loss between two paradigms; 0 with one."""


@dataclass(frozen=True)
class ContextLoss:
    """Nats a token of the last tokens of sequences that are cut to one length from the left."""

    context: int
    """Tokens from the first one read to the last one scored."""
    tokens: int
    """Measured."""
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """All that was measured of a run."""

    trained_length: int
    lengths: list[LengthLoss] = field(default_factory=list)
    contexts: list[ContextLoss] = field(default_factory=list)
    scored: int = 0
    """Tokens at the end of a sequence that `contexts` are about."""


def open_text(config: RunConfig, run: Any, lengths: Sequence[int]) -> Text:
    """The text of a run, for sequences of these lengths; SeqmixError: it has none, or too little is held out."""
    if config.data.kind != "text":
        raise SeqmixError(f"evaluate takes a run on text to other lengths, and this one learned {config.data.kind}")
    source = config.data.open(config.model.vocab_size, run)
    assert isinstance(source, Text)
    available, longest = len(source.corpus.validation), max(lengths, default=0)
    if longest >= available:
        raise SeqmixError(
            f"a sequence of {longest:,} tokens and its last target need {longest + 1:,} tokens of validation text, "
            f"and {source.name} has {available:,}"
        )
    return source


def common_paradigms(model: LanguageModel) -> tuple[Paradigm, ...]:
    """The paradigms that all layers declare, the configured one first where it is one."""
    declared = [block.mixer.traits.paradigms for block in model.blocks]
    configured = {block.mixer.paradigm for block in model.blocks}
    return tuple(sorted(frozenset(Paradigm).intersection(*declared), key=lambda p: (p not in configured, p)))


def by_length(
    model: LanguageModel,
    source: Text,
    lengths: Sequence[int],
    *,
    paradigms: Callable[[int], Sequence[Paradigm]],
    tokens: int,
) -> Iterator[LengthLoss]:
    """Measure the loss at each length, by each paradigm, on the same text: that of the longest sequences.

    Of a sequence that is no multiple of a length, the end is left out there. `paradigms` says by which ones a length is
    computed, the first of which the others are compared with; about `tokens` are read at each, one batch at least.
    """
    longest = max(lengths, default=1)
    rows = max(1, AT_ONCE // longest)
    for length in lengths:
        chosen = paradigms(length)
        counted, difference = torch.zeros(length, dtype=torch.int64), 0.0
        sums = {paradigm: torch.zeros(length, dtype=torch.float64) for paradigm in chosen}
        for example in source.evaluation_batches(rows, max(1, tokens // (rows * longest)), longest):
            batch = Batch(*(part[:, : longest // length * length].reshape(-1, length) for part in example.batch))
            found = {paradigm: _losses(model, source, batch, paradigm) for paradigm in chosen}
            for paradigm, losses in found.items():
                sums[paradigm] += losses.double().sum(0).cpu()
                difference = max(difference, (losses - found[chosen[0]]).abs().max().item())
            counted += (batch.targets != IGNORED).sum(0)
        whole = _at(sums, counted, 0, length)
        places = (_at(sums, counted, *place) for place in _bins(length, source.config.sequence_length))
        yield LengthLoss(length, whole.tokens, whole.losses, tuple(places), difference)


def by_context(
    model: LanguageModel, source: Text, contexts: Sequence[int], *, scored: int, tokens: int
) -> Iterator[ContextLoss]:
    """Measure the loss of the same tokens after more and less text, in the configured paradigm.

    Sequences have as many tokens as the longest context, `tokens` in all, about; of each, the last `scored` ones count,
    and what is further away than the context is not read. SeqmixError: a context is shorter than what is scored.
    """
    if scored < 1 or min(contexts) < scored:
        raise SeqmixError(f"the last {scored} tokens of a context are scored, and one has {min(contexts)}")
    longest = max(contexts)
    rows = max(1, AT_ONCE // longest)
    for context in contexts:
        total, counted = 0.0, 0
        for example in source.evaluation_batches(rows, max(1, tokens // (rows * longest)), longest):
            inputs, targets = (part[:, longest - context :] for part in example.batch)
            total += _losses(model, source, Batch(inputs, targets), None)[:, -scored:].double().sum().item()
            counted += int((targets[:, -scored:] != IGNORED).sum())
        yield ContextLoss(context, counted, total / max(counted, 1))


@torch.no_grad()
def _losses(model: LanguageModel, source: Text, batch: Batch, paradigm: Paradigm | None) -> Float[Tensor, "B T"]:
    """The loss of each token; documents start from nothing where the run packs them."""
    inputs, targets, cu_seqlens = source.packed(Batch(*(part.to(model.device) for part in batch)))
    output = model(inputs, targets=targets, reduction="none", paradigm=paradigm, cu_seqlens=cu_seqlens)
    return output.loss.view(batch.inputs.shape)


def _bins(length: int, trained: int) -> list[tuple[int, int]]:
    """Stretches of positions that double: to a quarter of a training sequence, to a half, to the whole, to two, ..."""
    doubling = (max(trained // 4, 1) << times for times in count())
    return list(pairwise([0, *takewhile(lambda edge: edge < length, doubling), length]))


def _at(sums: dict[Paradigm, Tensor], counted: Tensor, start: int, stop: int) -> PositionLoss:
    tokens = int(counted[start:stop].sum())
    means = {paradigm: total[start:stop].sum().item() / max(tokens, 1) for paradigm, total in sums.items()}
    return PositionLoss(start, stop, tokens, means)
