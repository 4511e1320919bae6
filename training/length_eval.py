"""Loss of a trained model on its validation split.

`as_in_training` repeats the final evaluation of training. `by_length` measures the loss by position in sequences longer
than those of training, each from an empty state. `by_context` measures the loss of the same tokens after more or less
preceding text.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..data import Batch
from ..data.loss_slices import bins
from ..data.tasks.text import Text
from ..mixers import Paradigm
from ..models import IGNORED, LanguageModel
from ..registry import SeqmixError
from .config import RunConfig, TrainingConfig

LENGTH_MULTIPLES = (1, 2, 4, 8, 16)
"""Default lengths, as multiples of the training length."""
BATCH_TOKENS = 4096
"""Maximum number of tokens per batch, unless a single sequence is longer."""


@dataclass(frozen=True)
class PositionLoss:
    """Loss (nats per token) at the positions start to stop - 1 of a sequence."""

    start: int
    """First position of the range, counted from 0."""
    stop: int
    """Position after the last one of the range."""
    tokens: int
    """Number of tokens measured."""
    losses: dict[Paradigm, float]
    """Mean loss in nats per token, by paradigm."""


@dataclass(frozen=True)
class FinalLoss:
    """Loss (nats per token) on the sequences of training's final evaluation."""

    tokens: int
    """Number of tokens measured."""
    loss: float
    """Mean loss in nats per token, in the configured paradigm."""
    error: float | None
    """Standard error of `loss` over sequences; None with a single one."""


@dataclass(frozen=True)
class LengthLoss:
    """Loss (nats per token) of sequences of one length."""

    length: int
    """Sequence length in tokens."""
    tokens: int
    """Number of tokens measured."""
    losses: dict[Paradigm, float]
    """Mean loss in nats per token, by paradigm."""
    positions: tuple[PositionLoss, ...]
    """Loss by range of positions."""
    difference: float
    """Largest difference, in nats, of one token's loss between the first paradigm and another; 0 with one paradigm."""
    error: float | None = None
    """Standard error of the first paradigm's loss over stretches of text of the longest length; None with a single
    one."""


@dataclass(frozen=True)
class ContextLoss:
    """Loss (nats per token) of the last tokens of sequences, after a context of one length."""

    context: int
    """Context length in tokens, scored tokens included; longer sequences are truncated on the left."""
    tokens: int
    """Number of tokens measured."""
    loss: float
    """Mean loss in nats per token."""


@dataclass(frozen=True)
class Evaluation:
    """Validation losses of a run: as in training, by sequence length and by context length."""

    trained_length: int
    """Sequence length of training, in tokens."""
    final: FinalLoss | None = None
    """Loss on the sequences of training's final evaluation; None if something else was requested."""
    lengths: list[LengthLoss] = field(default_factory=list)
    """Losses by sequence length."""
    contexts: list[ContextLoss] = field(default_factory=list)
    """Losses by context length."""
    scored: int = 0
    """Number of tokens at the end of each sequence that are scored for `contexts`; 0 without contexts."""


def open_text(config: RunConfig, run: Any, lengths: Sequence[int]) -> Text:
    """Open the text of a run, to evaluate sequences of these lengths.

    Raises:
        SeqmixError: the run was not trained on text, or its validation split is too short.
    """
    if config.data.kind != "text":
        raise SeqmixError(f"evaluate needs a run trained on data.kind text, got {config.data.kind}")
    source = config.data.open(config.model.vocab_size, run)
    assert isinstance(source, Text)
    available = len(source.corpus.validation)
    longest = max(lengths, default=0)
    if longest >= available:
        raise SeqmixError(
            f"sequence length {longest:,} needs {longest + 1:,} validation tokens (one more, for the last target), but "
            f"{source.name} has {available:,}: choose a shorter length"
        )
    return source


def common_paradigms(model: LanguageModel) -> tuple[Paradigm, ...]:
    """Return the paradigms that every layer supports; those that a layer is configured to use come first."""
    declared = [block.mixer.traits.paradigms for block in model.blocks]
    configured = {block.mixer.paradigm for block in model.blocks}
    return tuple(sorted(frozenset(Paradigm).intersection(*declared), key=lambda p: (p not in configured, p)))


def as_in_training(model: LanguageModel, source: Text, training: TrainingConfig) -> FinalLoss:
    """Measure the loss on the sequences of training's final evaluation, in the configured paradigm.

    Args:
        model: the model, in evaluation mode.
        source: the text.
        training: the run's training.
    """
    losses = _SequenceLosses()
    for example in source.evaluation_batches(training.batch_size, training.final_evaluation_batches):
        losses.add(_losses(model, source, example.batch, None), example.batch)
    return FinalLoss(losses.tokens, losses.mean, losses.error)


def by_length(
    model: LanguageModel,
    source: Text,
    lengths: Sequence[int],
    *,
    paradigms: Callable[[int], Sequence[Paradigm]],
    tokens: int,
) -> Iterator[LengthLoss]:
    """Measure the loss at each length in each paradigm, on the same text.

    The longest sequences are cut into shorter ones; a remainder at their end is left out.

    Args:
        model: the model, in evaluation mode.
        source: the text.
        lengths: sequence lengths in tokens.
        paradigms: returns the paradigms to measure at a length; the first is the reference for `LengthLoss.difference`.
        tokens: approximate number of tokens per length; at least one batch is read.
    """
    longest = max(lengths, default=1)
    rows = max(1, BATCH_TOKENS // longest)
    for length in lengths:
        chosen = paradigms(length)
        counted = torch.zeros(length, dtype=torch.int64)
        difference = 0.0
        sums = {paradigm: torch.zeros(length, dtype=torch.float64) for paradigm in chosen}
        stretches = _SequenceLosses()
        for example in source.evaluation_batches(rows, max(1, tokens // (rows * longest)), longest):
            batch = Batch(*(part[:, : longest // length * length].reshape(-1, length) for part in example.batch))
            by_paradigm = {paradigm: _losses(model, source, batch, paradigm) for paradigm in chosen}
            for paradigm, losses in by_paradigm.items():
                sums[paradigm] += losses.double().sum(0).cpu()
                difference = max(difference, (losses - by_paradigm[chosen[0]]).abs().max().item())
            counted += (batch.targets != IGNORED).sum(0)
            stretches.add(by_paradigm[chosen[0]].view(rows, -1), Batch(*(part.view(rows, -1) for part in batch)))
        total = _mean_losses(sums, counted, 0, length)
        positions = (_mean_losses(sums, counted, *place) for place in bins(length, source.config.sequence_length))
        yield LengthLoss(length, total.tokens, total.losses, tuple(positions), difference, stretches.error)


def by_context(
    model: LanguageModel, source: Text, contexts: Sequence[int], *, scored: int, tokens: int
) -> Iterator[ContextLoss]:
    """Measure the loss of the same tokens after more or less preceding text, in the configured paradigm.

    Sequences are as long as the longest context, and truncated on the left for the shorter ones.

    Args:
        model: the model, in evaluation mode.
        source: the text.
        contexts: context lengths in tokens, scored tokens included.
        scored: number of tokens scored at the end of each sequence.
        tokens: approximate number of tokens of the untruncated sequences; at least one batch is read.

    Raises:
        SeqmixError: a context is shorter than `scored`.
    """
    if scored < 1 or min(contexts) < scored:
        raise SeqmixError(
            f"expected 1 to {min(contexts)} scored tokens (the length of the shortest context), got {scored}"
        )
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


class _SequenceLosses:
    """Losses and numbers of targets of sequences."""

    def __init__(self) -> None:
        self._sums: list[Float[Tensor, " B"]] = []
        self._counts: list[Float[Tensor, " B"]] = []

    def add(self, losses: Float[Tensor, "B T"], batch: Batch) -> None:
        """Add the sequences of a batch; rows without targets are left out."""
        counts = (batch.targets != IGNORED).sum(1).double()
        self._sums.append(losses.double().sum(1).cpu()[counts > 0])
        self._counts.append(counts[counts > 0])

    @property
    def tokens(self) -> int:
        """Number of targets."""
        return int(torch.cat(self._counts).sum())

    @property
    def mean(self) -> float:
        """Mean loss per target."""
        return (torch.cat(self._sums).sum() / self.tokens).item()

    @property
    def error(self) -> float | None:
        """Standard error of the mean, if sequences are independent; None of a single one."""
        sums, counts = torch.cat(self._sums), torch.cat(self._counts)
        if len(sums) < 2:
            return None
        deviations = sums - self.mean * counts  # of a ratio, as sequences may have different numbers of targets
        return ((deviations.square().sum() * len(sums) / (len(sums) - 1)).sqrt() / self.tokens).item()


@torch.no_grad()
def _losses(model: LanguageModel, source: Text, batch: Batch, paradigm: Paradigm | None) -> Float[Tensor, "B T"]:
    """Return the loss of each token; documents are packed as in training."""
    inputs, targets, cu_seqlens = source.packed(Batch(*(part.to(model.device) for part in batch)))
    output = model(inputs, targets=targets, reduction="none", paradigm=paradigm, cu_seqlens=cu_seqlens)
    return output.loss.view(batch.inputs.shape)


def _mean_losses(sums: dict[Paradigm, Tensor], counted: Tensor, start: int, stop: int) -> PositionLoss:
    tokens = int(counted[start:stop].sum())
    means = {paradigm: total[start:stop].sum().item() / max(tokens, 1) for paradigm, total in sums.items()}
    return PositionLoss(start, stop, tokens, means)
