"""State precision: what a trained model loses when the numbers of its state are stored in fewer bits.

Tokens are read one by one, in the recurrent paradigm. One batch holds the sequences once with the exact state and once
per format. After every n-th token, the states of a format are rounded to it and widened again (`state_format`), so the
recurrence computes in its own precision.

Notation: s a tensor of the exact state, s~ the stored one, N roundings n tokens apart, and

    r_k    relative error |s~ - s| / |s| that a single rounding leaves k tokens later

A probe measures r_k: the states are rounded once, then both read on without rounding. To first order, the error after N
roundings is the sum of what each has left:

    predicted = sqrt(sum_j r_{jn}^2)      if errors of different roundings are independent
    bound     = sum_j r_{jn}              if all point in the same direction,          j = 0 .. N - 1

If a rounding leaves r_k = u g^k, these tend to u / sqrt(1 - g^2n) and u / (1 - g^n). With error feedback, each rounding
subtracts what the one before has left: r_{jn} - r_{(j-1)n} takes the place of r_{jn}.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import Batch
from ...mixers.base.state import from_dict, is_inexact, map_state, to_dict
from ...models import IGNORED, LanguageModel
from ...models.decoding import decode_step
from ...models.language_model import ModelState
from ...ops.runtime.memo import Memo
from ...registry import SeqmixError, require_name
from .state_format import ROUNDINGS, StateFormat

TOLERANCE = 0.01
"""Loss in nats per token from which a format counts as lossy."""
PROBE_TOKENS = 256
"""Maximum number of tokens over which the probe follows a rounding; what later ones leave is extrapolated."""
WRITTEN_ONCE = frozenset({"recent", "keys", "values", "inputs", "log_forget"})
"""Tensors of a state whose entries are inputs of past tokens: an entry is rounded once, when it is written."""
MIN_POINTS = 8
"""Minimum number of heads or channels for a rank correlation."""


@dataclass(frozen=True)
class FormatResult:
    """Measurements of one format over the first `length` tokens."""

    format: str
    """Name of the number format."""
    rounding: str
    """`nearest`, `stochastic` or `compensated`."""
    bits: int
    """Bits per number without scales; `compensated` stores a second number."""
    length: int
    """Number of tokens read."""
    state_bytes: int
    """Size of one sequence's state after these tokens, with scales, stored errors and tensors that stay exact."""
    loss: float
    """Mean loss over these tokens, in nats per token."""
    lost: float
    """`loss` minus that of the exact state."""
    lost_error: float
    """Standard error of `lost` over sequences; NaN with a single one."""
    agreement: float
    """Share of tokens after which the most probable token is that of the exact state."""
    accuracy: float
    """Share of targets that are the most probable token."""
    state_error: float
    """Relative error of the state after these tokens: mean over its tensors, in each of which heads (or channels) count
    equally, by their squares."""
    predicted: float
    """Prediction of `state_error` by the probe, if errors of different roundings are independent."""
    bound: float
    """Prediction of `state_error` by the probe, if all errors point in the same direction."""
    correlation: float
    """Spearman rank correlation of predicted and measured errors over the heads (or channels) of all tensors; NaN for
    fewer than `MIN_POINTS`."""

    @property
    def name(self) -> str:
        """Format and rounding: `int8, stochastic`; the format alone if it rounds to nearest."""
        return self.format if self.rounding == "nearest" else f"{self.format}, {self.rounding}"


@dataclass(frozen=True)
class TensorErrors:
    """Relative errors of one tensor of the state after the longest length, in one format.

    Lists have one number per head or channel; a single one for a tensor whose entries are written once.
    """

    format: str
    rounding: str
    layer: int
    """Index of the layer, from 0."""
    mixer: str
    """Kind of the layer's mixer."""
    tensor: str
    """Name of the tensor in the layer's state, such as `memory`."""
    errors: list[float]
    """Measured errors."""
    predicted: list[float]
    """Errors predicted by the probe, if errors of different roundings are independent."""
    bound: list[float]
    """Errors predicted by the probe, if all errors point in the same direction."""


@dataclass(frozen=True)
class ExactResult:
    """Measurements of the exact state over the first `length` tokens."""

    length: int
    """Number of tokens read."""
    state_bytes: int
    """Size of one sequence's state after these tokens."""
    loss: float
    """Mean loss over these tokens, in nats per token."""
    accuracy: float
    """Share of targets that are the most probable token."""


@dataclass(frozen=True)
class Precision:
    """Losses of a model whose state is stored in fewer bits."""

    mixers: list[str]
    """Kinds of the model's mixers, without repetition."""
    sequences: int
    """Number of sequences."""
    every: int
    """Number of tokens between roundings."""
    scales: str
    """Numbers of an integer format that share a scale: those of a `channel` or of a `head`."""
    kept_exact: list[str]
    """Names of the tensors that were not rounded."""
    exact: list[ExactResult]
    """Measurements of the exact state, by length."""
    results: list[FormatResult]
    """Measurements of the formats, by length, then in the order of the formats."""
    positions: list[int]
    """Ends of ranges of positions, the first of which begins at 0."""
    lost_by_position: list[list[float]]
    """Loss in each of these ranges minus that of the exact state, for each format."""
    tensors: list[TensorErrors]
    """Errors of the tensors of the state after the longest length."""

    def fewest_bits(self, length: int, tolerance: float = TOLERANCE) -> FormatResult | None:
        """Return the result with the fewest bits that loses less than `tolerance`; None if all lose more.

        Of equal bits, it is the one with the simplest rounding, then the lowest loss.
        """
        fitting = [each for each in self.results if each.length == length and each.lost < tolerance]
        return min(fitting, key=lambda each: (each.bits, ROUNDINGS.index(each.rounding), each.lost), default=None)


@torch.no_grad()
def state_precision(
    model: LanguageModel,
    batch: Batch,
    formats: Sequence[StateFormat],
    lengths: Sequence[int],
    *,
    every: int = 1,
    keep_exact: Collection[str] = (),
    seed: int = 0,
    on_token: Callable[[int], object] = lambda _: None,
) -> Precision:
    """Read sequences token by token with exact and with rounded states, and compare losses, predictions and states.

    Integer tensors of a state, such as positions, stay exact.

    Args:
        model: the model, in evaluation mode.
        batch: the sequences and their targets, at least as long as the longest length.
        formats: the formats; all must share scales in the same way.
        lengths: numbers of tokens after which results are reported.
        every: number of tokens between roundings.
        keep_exact: names of tensors of the state, such as `angle`, that are not rounded.
        seed: seed of stochastic rounding.
        on_token: called after each token, with the number of tokens read.

    Raises:
        SeqmixError: a mixer has no state, no tensor of the state has one of the names, or an argument is out of range.
    """
    lengths = sorted(set(lengths))
    if not formats or not lengths or lengths[0] < 2 or every < 1 or len({each.scales for each in formats}) > 1:
        raise SeqmixError("expected formats with equal scales, lengths of at least 2 tokens, and every >= 1")
    if batch.inputs.shape[1] < lengths[-1]:
        raise SeqmixError(f"expected sequences of at least {lengths[-1]:,} tokens, got {batch.inputs.shape[1]:,}")
    inputs, targets = (part[:, : lengths[-1]].to(model.device) for part in batch)
    states = _States(model, formats, every, keep_exact, len(inputs), seed)
    scores = _Scores(targets, len(formats))
    probe_start = max(1, lengths[0] // 2)
    traces: dict[str, _Trace] = {}
    measured: dict[int, tuple[dict[str, Tensor], list[int]]] = {}
    for token in range(lengths[-1]):
        if token == probe_start:
            traces = states.probe(inputs[:, token : min(lengths[0], token + PROBE_TOKENS)])
        scores.add(token, states.read(inputs[:, token]))
        if token + 1 in lengths:
            measured[token + 1] = states.errors(), states.nbytes()
        on_token(token + 1)
    exact: list[ExactResult] = []
    results: list[FormatResult] = []
    tensors: list[TensorErrors] = []
    for length, (errors, sizes) in measured.items():
        exact.append(ExactResult(length, sizes[0], *scores.summary(0, length)))
        for i, each in enumerate(formats):
            by_tensor = {
                name: _HeadErrors(errors[name][i], *trace.predict(i, each, length // every, every))
                for name, trace in traces.items()
            }
            result = FormatResult(
                each.format,
                each.rounding,
                each.bits,
                length,
                sizes[i + 1],
                *scores.compare(i + 1, length),
                *_summary(list(by_tensor.values())),
            )
            results.append(result)
            if length == lengths[-1]:
                tensors += [
                    TensorErrors(each.format, each.rounding, *states.place(name), *(part.tolist() for part in heads))
                    for name, heads in by_tensor.items()
                ]
    positions = _doublings(lengths[-1])
    return Precision(
        mixers=list(dict.fromkeys(block.mixer.kind for block in model.blocks)),
        sequences=len(inputs),
        every=every,
        scales=formats[0].scales,
        kept_exact=sorted(keep_exact),
        exact=exact,
        results=results,
        positions=positions,
        lost_by_position=[scores.by_position(i + 1, positions) for i in range(len(formats))],
        tensors=tensors,
    )


class _HeadErrors(NamedTuple):
    """Relative errors of a tensor of the state, one per head or channel."""

    errors: Tensor
    predicted: Tensor
    bound: Tensor


def _summary(tensors: Sequence[_HeadErrors]) -> tuple[float, float, float, float]:
    """Return the means of errors, predictions and bounds over tensors, and the rank correlation over their heads."""
    means = [fmean(part.square().mean().sqrt().item() for part in parts) for parts in zip(*tensors, strict=True)]
    errors, predicted, _ = (torch.cat(parts) for parts in zip(*tensors, strict=True))
    return means[0], means[1], means[2], rank_correlation(errors, predicted)


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Return Spearman's rank correlation of two lists of numbers; equal numbers share the mean of their ranks.

    NaN for fewer than `MIN_POINTS` pairs of finite numbers, or if one of the lists has equal numbers only.
    """
    finite = x.isfinite() & y.isfinite()
    if finite.sum() < MIN_POINTS:
        return math.nan
    return torch.corrcoef(torch.stack((_ranks(x[finite]), _ranks(y[finite]))))[0, 1].item()


def _ranks(x: Tensor) -> Tensor:
    _, index, counts = x.double().unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[index]


def _doublings(stop: int) -> list[int]:
    """Return the powers of 2 below `stop`, from 16 on, and `stop`."""
    return [16 << i for i in range(stop.bit_length()) if 16 << i < stop] + [stop]


class _Trace(NamedTuple):
    """Errors of one tensor of the state, as the probe measured them."""

    left: Tensor
    """Relative errors r_k, [formats, K+1, heads]: k tokens after one rounding."""
    written: Tensor
    """Relative errors of rounding entries that are written once, [formats, heads]; 0 for other tensors."""

    def predict(self, i: int, state_format: StateFormat, roundings: int, every: int) -> tuple[Tensor, Tensor]:
        """Return the predicted error and the bound of a format after a number of roundings, each [heads]."""
        if roundings == 0:
            return torch.zeros_like(self.left[i, 0]), torch.zeros_like(self.left[i, 0])
        decay = self._decay(i) ** every
        left = self.left[i, ::every][:roundings]
        later = roundings - len(left)  # roundings longer ago than the probe reached: last g + last g^2 + ...
        last = left[-1]
        if state_format.rounding == "compensated":
            left = torch.cat((left[:1], left.diff(dim=0).abs()))
            last = last * (1 - decay)
        squares = left.square().sum(0) + last.square() * _geometric_sum(decay.square(), later)
        total = left.sum(0) + last * _geometric_sum(decay, later)
        return (squares + self.written[i].square()).sqrt(), total + self.written[i]

    def _decay(self, i: int) -> Tensor:
        """Return the factor per token by which errors shrink in the second half of the probe, [heads]; at most 1."""
        half = (self.left.shape[1] - 1) // 2
        middle, end = self.left[i, -1 - half], self.left[i, -1]
        return torch.where(middle > 0, end / middle, 0.0).clamp(max=1.0) ** (1 / max(half, 1))


def _geometric_sum(ratio: Tensor, terms: int) -> Tensor:
    """Return ratio + ratio^2 + ... + ratio^terms."""
    rest = 1 - ratio
    return torch.where(rest > 1e-12, ratio * (1 - ratio**terms) / rest.clamp(min=1e-12), float(terms))


class _States:
    """The model's state for all rows: first the sequences with the exact state, then the same with each format.

    Raises:
        SeqmixError: a mixer has no state, or no tensor of the state has one of the names `keep_exact`.
    """

    def __init__(
        self,
        model: LanguageModel,
        formats: Sequence[StateFormat],
        every: int,
        keep_exact: Collection[str],
        sequences: int,
        seed: int,
    ) -> None:
        for layer, block in enumerate(model.blocks):
            if not block.mixer.traits.has_state:
                raise SeqmixError(f"layer {layer}: {block.mixer.kind} has no state whose precision could be measured")
        self.model = model
        self.formats = formats
        self.every = every
        self.rows = 1 + len(formats)
        self.sequences = sequences
        self.state: ModelState = model.init_state(self.rows * sequences)
        self.tokens = 0
        self._memo = Memo()
        self._generator = torch.Generator(model.device).manual_seed(seed)
        leaves = to_dict(self.state)
        names = {name.rpartition(".")[2] for name, leaf in leaves.items() if is_inexact(leaf)}
        for name in keep_exact:
            require_name("tensor of the state", name, sorted(names))
        self.rounded = [
            name for name, leaf in leaves.items() if is_inexact(leaf) and name.rpartition(".")[2] not in keep_exact
        ]
        """Names of the tensors that are rounded."""
        self.written_once = {name for name in self.rounded if name.rpartition(".")[2] in WRITTEN_ONCE}
        """Names of the tensors whose entries are rounded only once."""
        self._slots = {name: leaf.shape[1] for name, leaf in leaves.items() if leaf.ndim > 1}
        self._carried: dict[tuple[str, int], Tensor] = {}
        """Error of the previous rounding, by tensor and format."""

    def place(self, name: str) -> tuple[int, str, str]:
        """Return the layer of a tensor, the kind of its mixer, and its name in the layer's state."""
        layer, _, tensor = name.partition(".")
        return int(layer), self.model.blocks[int(layer)].mixer.kind, tensor

    def read(self, tokens: Tensor) -> Tensor:
        """Read one token per sequence, and round the states if it is time; return logits [rows, sequences, vocab]."""
        logits, self.state = decode_step(
            self.model, tokens.repeat(self.rows), self.state, donate_state=True, memo=self._memo
        )
        self.tokens += 1
        if self.tokens % self.every == 0:
            leaves = to_dict(self.state)
            self.state = from_dict(
                self.state, leaves | {name: self._store(name, leaves[name]) for name in self.rounded}
            )
        return logits.unflatten(0, (self.rows, -1))

    def _store(self, name: str, leaf: Tensor) -> Tensor:
        """Return a tensor of the state as the formats store it; the exact rows stay as they are."""
        if (stored := self._slots.get(name)) is not None and leaf.shape[1] > stored:  # a growing cache
            self.written_once.add(name)
            self._slots[name] = leaf.shape[1]
            new = leaf[:, stored:]
            new.copy_(self._round(new))
            return leaf
        if name in self.written_once:
            return self._round(leaf)
        exact, *others = leaf.unflatten(0, (self.rows, -1))
        return torch.cat((exact, *(self._compensate(name, i, x) for i, x in enumerate(others))))

    def _round(self, leaf: Tensor) -> Tensor:
        exact, *others = leaf.unflatten(0, (self.rows, -1))
        return torch.cat((exact, *(one.round(x, self._generator) for one, x in zip(self.formats, others, strict=True))))

    def _compensate(self, name: str, i: int, x: Tensor) -> Tensor:
        """Round a tensor to a format; with error feedback, add the error of the previous rounding before."""
        each = self.formats[i]
        if each.rounding != "compensated":
            return each.round(x, self._generator)
        wanted = x + self._carried.get((name, i), 0.0)
        stored = each.round(wanted)
        self._carried[name, i] = each.round((wanted - stored).nan_to_num_(0.0, 0.0, 0.0))  # infinities leave no error
        return stored

    def errors(self) -> dict[str, Tensor]:
        """Return the relative errors of the tensors that are rounded, [formats, heads]."""
        leaves = to_dict(self.state)
        return {name: self._relative(name, leaves[name]) for name in self.rounded if leaves[name].numel()}

    def _relative(self, name: str, leaf: Tensor) -> Tensor:
        x = leaf.unflatten(0, (self.rows, -1)).double()
        heads = [] if name in self.written_once or x.ndim < 3 else [2]
        others = [dim for dim in range(1, x.ndim) if dim not in heads]
        squares = torch.where(x[1:] == x[:1], 0.0, x[1:] - x[:1]).square().sum(others)  # infinities may be equal
        size = torch.where(x[:1].isfinite(), x[:1], 0.0).square().sum(others)
        return torch.where(squares == 0, 0.0, squares / size).sqrt().reshape(len(self.formats), -1).cpu()

    def nbytes(self) -> list[int]:
        """Return the size of one sequence's state: exact, and in each format."""
        sizes = [0] * self.rows
        for name, leaf in to_dict(self.state).items():
            n_bytes = leaf[0].numel() * leaf.element_size()
            sizes[0] += n_bytes
            for i, each in enumerate(self.formats, 1):
                bits = each.stored_bits(leaf[:1].shape, written_once=name in self.written_once)
                sizes[i] += math.ceil(bits / 8) if name in self.rounded else n_bytes
        return sizes

    def probe(self, tokens: Tensor) -> dict[str, _Trace]:
        """Round the exact states once, read tokens [B K] without rounding, and return what is left of the errors.

        Entries that are written once stay exact meanwhile; their rounding is measured at the start.
        """
        state = map_state(lambda x: x[: self.sequences].repeat(self.rows, *[1] * (x.ndim - 1)), self.state)
        leaves = to_dict(state)
        rounded = {name: self._round(leaves[name]) for name in self.rounded if leaves[name].numel()}
        if not rounded:
            raise SeqmixError("no tensor of the state is left to round: keep fewer tensors exact")
        written = {name: self._relative(name, leaf) for name, leaf in rounded.items()}
        accumulated = {name: leaf for name, leaf in rounded.items() if name not in self.written_once}
        state = from_dict(state, leaves | accumulated)
        left = {name: [written[name] * (name in accumulated)] for name in rounded}
        memo = Memo()
        for token in tokens.T:
            _, state = decode_step(self.model, token.repeat(self.rows), state, donate_state=True, memo=memo)
            leaves = to_dict(state)
            for name, errors in left.items():
                errors.append(self._relative(name, leaves[name]))
        return {
            name: _Trace(torch.stack(errors, dim=1), written[name] * (name not in accumulated))
            for name, errors in left.items()
        }


class _Scores:
    """Losses and predictions of all rows (the exact state, then the formats) at every token."""

    def __init__(self, targets: Tensor, n_formats: int) -> None:
        self.targets = targets
        self.scored = (targets != IGNORED).cpu()
        self.losses = torch.zeros(1 + n_formats, *targets.shape)
        self.right = torch.zeros(1 + n_formats, *targets.shape, dtype=torch.bool)
        self.agrees = torch.zeros(1 + n_formats, *targets.shape, dtype=torch.bool)

    def add(self, token: int, logits: Tensor) -> None:
        """Score the logits [rows, sequences, vocab] of the token after this one."""
        targets = self.targets[:, token]
        every_row = targets.expand(len(logits), -1)
        losses = F.cross_entropy(logits.movedim(-1, 1).float(), every_row, ignore_index=IGNORED, reduction="none")
        predictions = logits.argmax(-1)
        self.losses[..., token] = losses.cpu()
        self.right[..., token] = (predictions == targets).cpu()
        self.agrees[..., token] = (predictions == predictions[:1]).cpu()

    def summary(self, row: int, length: int) -> tuple[float, float]:
        """Return loss and accuracy of a row over the first tokens."""
        return self._mean(self.losses[row], 0, length), self._mean(self.right[row], 0, length)

    def compare(self, row: int, length: int) -> tuple[float, float, float, float, float]:
        """Return a row's loss over the first tokens, its difference from the exact state's loss and the difference's
        standard error, its agreement with the exact state, and its accuracy."""
        loss, accuracy = self.summary(row, length)
        difference = self.losses[row] - self.losses[0]
        by_sequence = [
            values[:length][scored[:length]].mean()
            for values, scored in zip(difference, self.scored, strict=True)
            if scored[:length].any()
        ]
        n = len(by_sequence)
        error = torch.stack(by_sequence).std().item() / math.sqrt(n) if n > 1 else math.nan
        return loss, self._mean(difference, 0, length), error, self._mean(self.agrees[row], 0, length), accuracy

    def by_position(self, row: int, ends: Sequence[int]) -> list[float]:
        """Return the mean difference from the exact state's loss in the ranges of positions that end at `ends`."""
        difference = self.losses[row] - self.losses[0]
        return [self._mean(difference, start, stop) for start, stop in pairwise((0, *ends))]

    def _mean(self, values: Tensor, start: int, stop: int) -> float:
        """Return the mean over the scored tokens from `start` to `stop` - 1; NaN without any."""
        return values[:, start:stop][self.scored[:, start:stop]].double().mean().item()
