"""Length extrapolation: the loss of a trained model at other sequence lengths.

By length: the loss by position in sequences longer than those of training, each from an empty state. By context: the
loss of the same tokens after more or less preceding text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..data import Batch
from ..data.kinds.text import Text
from ..data.slices import bins
from ..mixers import Paradigm
from ..models import IGNORED, LanguageModel
from ..registry import SeqmixError
from .config import RunConfig

TIMES = (1, 2, 4, 8, 16)
"""Lengths that are measured, as multiples of the training length."""
BATCH_TOKENS = 4096
"""Tokens per batch; at least one sequence."""


@dataclass(frozen=True)
class PositionLoss:
    """Loss (nats per token) at the positions start to stop - 1 of a sequence."""

    start: int
    stop: int
    tokens: int
    """Measured."""
    losses: dict[Paradigm, float]


@dataclass(frozen=True)
class LengthLoss:
    """Loss (nats per token) of sequences of one length."""

    length: int
    tokens: int
    """Measured."""
    losses: dict[Paradigm, float]
    positions: tuple[PositionLoss, ...]
    difference: float
    """The largest difference of one token's loss between two paradigms; 0 for one paradigm."""


@dataclass(frozen=True)
class ContextLoss:
    """Loss (nats per token) of the last tokens of sequences, truncated on the left to one length."""

    context: int
    """Length after truncation, scored tokens included."""
    tokens: int
    """Measured."""
    loss: float


@dataclass(frozen=True)
class Evaluation:
    """All measurements of a run."""

    trained_length: int
    lengths: list[LengthLoss] = field(default_factory=list)
    contexts: list[ContextLoss] = field(default_factory=list)
    scored: int = 0
    """Tokens at the end of a sequence that `contexts` score."""


def open_text(config: RunConfig, run: Any, lengths: Sequence[int]) -> Text:
    """The text of a run, for sequences of these lengths; SeqmixError: it has none, or too little validation text."""
    if config.data.kind != "text":
        raise SeqmixError(f"evaluate needs a run trained on text, and this one was trained on {config.data.kind}")
    source = config.data.open(config.model.vocab_size, run)
    assert isinstance(source, Text)
    available = len(source.corpus.validation)
    longest = max(lengths, default=0)
    if longest >= available:
        raise SeqmixError(
            f"a sequence of {longest:,} tokens and its last target need {longest + 1:,} validation tokens, "
            f"and {source.name} has {available:,}"
        )
    return source


def common_paradigms(model: LanguageModel) -> tuple[Paradigm, ...]:
    """The paradigms that all layers declare, configured ones first."""
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
    """Measure the loss at each length, by each paradigm, on the same text (that of the longest sequences).

    Where the longest sequence is not a multiple of a length, its end is left out. `paradigms` gives those that compute
    a length; the first is the reference for the difference. About `tokens` are read per length, at least one batch.
    """
    longest = max(lengths, default=1)
    rows = max(1, BATCH_TOKENS // longest)
    for length in lengths:
        chosen = paradigms(length)
        counted = torch.zeros(length, dtype=torch.int64)
        difference = 0.0
        sums = {paradigm: torch.zeros(length, dtype=torch.float64) for paradigm in chosen}
        for example in source.evaluation_batches(rows, max(1, tokens // (rows * longest)), longest):
            batch = Batch(*(part[:, : longest // length * length].reshape(-1, length) for part in example.batch))
            found = {paradigm: _losses(model, source, batch, paradigm) for paradigm in chosen}
            for paradigm, losses in found.items():
                sums[paradigm] += losses.double().sum(0).cpu()
                difference = max(difference, (losses - found[chosen[0]]).abs().max().item())
            counted += (batch.targets != IGNORED).sum(0)
        whole = _at(sums, counted, 0, length)
        places = (_at(sums, counted, *place) for place in bins(length, source.config.sequence_length))
        yield LengthLoss(length, whole.tokens, whole.losses, tuple(places), difference)


def by_context(
    model: LanguageModel, source: Text, contexts: Sequence[int], *, scored: int, tokens: int
) -> Iterator[ContextLoss]:
    """Measure the loss of the same tokens after more and less text, in the configured paradigm.

    Sequences are as long as the longest context, about `tokens` in all. The last `scored` tokens of each count; text
    further away than the context is not read. SeqmixError: a context is shorter than `scored`.
    """
    if scored < 1 or min(contexts) < scored:
        raise SeqmixError(f"scored is {scored}, and the shortest context has {min(contexts)} tokens")
    longest = max(contexts)
    rows = max(1, BATCH_TOKENS // longest)
    for context in contexts:
        total = 0.0
        counted = 0
        for example in source.evaluation_batches(rows, max(1, tokens // (rows * longest)), longest):
            inputs, targets = (part[:, longest - context :] for part in example.batch)
            total += _losses(model, source, Batch(inputs, targets), None)[:, -scored:].double().sum().item()
            counted += int((targets[:, -scored:] != IGNORED).sum())
        yield ContextLoss(context, counted, total / max(counted, 1))


@torch.no_grad()
def _losses(model: LanguageModel, source: Text, batch: Batch, paradigm: Paradigm | None) -> Float[Tensor, "B T"]:
    """The loss of each token; documents are packed where the run packs them."""
    inputs, targets, cu_seqlens = source.packed(Batch(*(part.to(model.device) for part in batch)))
    output = model(inputs, targets=targets, reduction="none", paradigm=paradigm, cu_seqlens=cu_seqlens)
    return output.loss.view(batch.inputs.shape)


def _at(sums: dict[Paradigm, Tensor], counted: Tensor, start: int, stop: int) -> PositionLoss:
    tokens = int(counted[start:stop].sum())
    means = {paradigm: total[start:stop].sum().item() / max(tokens, 1) for paradigm, total in sums.items()}
    return PositionLoss(start, stop, tokens, means)
