"""Weights of 8 and 4 bits, for inference on a CPU: decoding reads all weights for every token, and these are smaller.

    int8    w = c_n q            q from -127 to 127, a scale c for every output n
    int4    w = c_ng q + o_ng    q from 0 to 15, a scale c and an offset o for every output and group g of 32 inputs

The roles of parameters (`mixers.base.roles`) decide: linear layers of mixers, feed-forward networks and experts are
quantised, with the gates that are rows of the same matrix, and the readout. Gates with a matrix of their own, rates,
convolutions, norms, vectors, embeddings and small matrices stay as they are. A readout that is tied to the embedding
gets codes of its own: a token looks up one row of the embedding, but reads the whole readout.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks.ffn.moe import ExpertLinear
from ..mixers.base.roles import Role, roles_of
from ..ops.grouped_linear import grouped_linear
from ..ops.kernels.native.quantized import GROUP, can_multiply, is_supported, multiply_int4, multiply_int8
from ..ops.runtime.custom_op import needs_grad, register
from ..registry import SeqmixError, require_name
from .cpu_linear import Linear
from .language_model import LanguageModel

MIN_WEIGHTS = 2**14
"""Minimum number of weights of a quantised matrix: products with smaller ones take longer than with floats."""
ROUNDS = 3
"""Number of times that scales and offsets of 4 bits are fitted to the codes."""
FITTED_ROWS = 4096
"""Number of outputs that are quantised at once, which limits the memory needed."""


class QuantizedLinear(nn.Linear):
    """A linear layer with quantised weights, for inference; without gradients of the weights."""

    bits: ClassVar[int]
    """Bits of a code."""
    stored: ClassVar[tuple[str, ...]]
    """Names of the tensors that make up the weights; each has a row for every output."""
    native: ClassVar[Callable[..., Tensor]]
    """Product with rows [* K] by the native kernel."""
    node: ClassVar[Callable[..., Tensor]]
    """Product with rows [* K] as one node of a compiled graph."""
    like: nn.Parameter
    """Empty parameter with the dtype of the weights before they were quantised."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None) -> None:
        """Allocate the tensors for a matrix [N K]; `encode` fills them."""
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        # a parameter, because a mixer computes in the dtype of its first parameter
        self.like = nn.Parameter(weight.detach().new_empty(0), requires_grad=False)
        self.groups = -(-self.in_features // GROUP)  # pad to whole groups
        self.allocate(weight.device)
        self.eval()

    @abstractmethod
    def allocate(self, device: torch.device) -> None:
        """Register the tensors of `stored`."""

    @abstractmethod
    def encode(self, weight: Tensor) -> None:
        """Quantise a matrix [N K]."""

    @staticmethod
    @abstractmethod
    def decode(tensors: tuple[Tensor, ...], width: int) -> Tensor:
        """Return the matrix [N K] in float32 of the tensors of some outputs, for K = `width` inputs."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors that make up the weights."""
        return tuple(self._buffers[name] for name in self.stored)  # pyright: ignore[reportReturnType]

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The matrix as a new tensor of floats [N K]: writing into it does not change the layer."""
        return self.decode(self.tensors, self.in_features).to(self.like.dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return self._multiply(input, self.tensors, self.bias)

    def forward_rows(self, x: Tensor, rows: slice) -> Tensor:
        """Apply the rows of the matrix that belong to some outputs, without the bias."""
        return self._multiply(x, tuple(tensor[rows] for tensor in self.tensors), None)

    def _multiply(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            if not needs_grad(x) and not torch.is_autocast_enabled(x.device.type):
                return type(self).node(x, *tensors, bias)
        elif can_multiply(x, bias):
            return type(self).native(x, *tensors, bias)
        return F.linear(x, self.decode(tensors, self.in_features).to(x.dtype), bias)

    def reset_parameters(self) -> None:
        """Raise SeqmixError: quantised weights are not initialised."""
        raise SeqmixError(f"weights of {self.bits} bits cannot be initialised: quantise a model with its final weights")

    def train(self, mode: bool = True) -> "QuantizedLinear":
        """Set evaluation mode; raise SeqmixError for training mode."""
        if mode:
            raise SeqmixError(
                f"weights of {self.bits} bits are for inference, and cannot be trained: load the run without "
                "--weights (weights=None)"
            )
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Move the tensors. Only `like` and the bias change their dtype: rounding scales would change the weights."""
        before = self.tensors
        super()._apply(fn, recurse)
        for name, tensor in zip(self.stored, before, strict=True):
            moved = cast("Tensor", self._buffers[name])
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, bits={self.bits}"


def _run_int8(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    if is_supported(x):
        return multiply_int8(x, codes, scales, bias)
    return F.linear(x, Int8Linear.decode((codes, scales), x.shape[-1]).to(x.dtype), bias)


def _run_int4(x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    if is_supported(x):
        return multiply_int4(x, codes, scales, offsets, bias)
    return F.linear(x, Int4Linear.decode((codes, scales, offsets), x.shape[-1]).to(x.dtype), bias)


def _fake(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


_INT8 = register("linear_int8", "(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor", _run_int8, _fake)
_INT4 = register(
    "linear_int4", "(Tensor x, Tensor codes, Tensor scales, Tensor offsets, Tensor? bias) -> Tensor", _run_int4, _fake
)


class Int8Linear(QuantizedLinear):
    """A linear layer with weights of 8 bits and one scale per output."""

    bits = 8
    stored = ("codes", "scales")
    native = multiply_int8
    node = _INT8
    codes: Tensor
    """Codes, int8 [N groups * 32]; those after the last input are 0."""
    scales: Tensor
    """Scale of each output, float32 [N]."""

    def allocate(self, device: torch.device) -> None:  # noqa: D102
        shape = self.out_features, self.groups * GROUP
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.zeros(self.out_features, dtype=torch.float32, device=device))

    def encode(self, weight: Tensor) -> None:  # noqa: D102
        weight = weight.to(torch.float32)
        scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        self.scales.copy_(scales)
        self.codes[:, : self.in_features] = (weight / scales[:, None]).round().clamp(-127, 127).to(torch.int8)

    @staticmethod
    def decode(tensors: tuple[Tensor, ...], width: int) -> Tensor:  # noqa: D102
        codes, scales = tensors
        return codes[:, :width].float() * scales[:, None]


class Int4Linear(QuantizedLinear):
    """A linear layer with weights of 4 bits, with a scale and an offset per output and group of 32 inputs."""

    bits = 4
    stored = ("codes", "scales", "offsets")
    native = multiply_int4
    node = _INT4
    codes: Tensor
    """Codes, uint8 [N groups 16]: a byte has inputs i (its low bits) and i + 16 (its high bits) of a group."""
    scales: Tensor
    """Scale of each group, bfloat16 [N groups]."""
    offsets: Tensor
    """Offset of each group, bfloat16 [N groups]."""

    def allocate(self, device: torch.device) -> None:  # noqa: D102
        shape = self.out_features, self.groups
        self.register_buffer("codes", torch.zeros(*shape, GROUP // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(shape, dtype=torch.bfloat16, device=device))
        self.register_buffer("offsets", torch.zeros(shape, dtype=torch.bfloat16, device=device))

    def encode(self, weight: Tensor) -> None:  # noqa: D102
        # the last input is repeated up to a whole group: it does not widen the range of the group
        columns = torch.arange(self.groups * GROUP, device=weight.device).clamp(max=self.in_features - 1)
        for first in range(0, self.out_features, FITTED_ROWS):
            part = slice(first, first + FITTED_ROWS)
            groups = weight[part].to(torch.float32)[:, columns].unflatten(1, (-1, GROUP))
            codes, self.scales[part], self.offsets[part] = _fit(groups)
            low, high = codes.to(torch.uint8).chunk(2, -1)
            self.codes[part] = low | high << 4

    @staticmethod
    def decode(tensors: tuple[Tensor, ...], width: int) -> Tensor:  # noqa: D102
        codes, scales, offsets = tensors
        values = torch.cat((codes & 15, codes >> 4), -1).float()
        return torch.addcmul(offsets[..., None].float(), values, scales[..., None].float()).flatten(1)[:, :width]


def _fit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes of groups [* 32], and scales and offsets in bfloat16 [*].

    The codes first cover the range of a group. Then scale and offset are fitted to the codes by least squares, and
    weights are rounded again; of all rounds, each group takes the one with the smallest error.
    """
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale, offset = (high - low) / 15, low
    best: tuple[Tensor, ...] | None = None
    for _ in range(1 + ROUNDS):
        scale, offset = (y.to(torch.bfloat16) for y in (scale.clamp(min=1e-30), offset))
        codes = ((x - offset.float()) / scale.float()).round().clamp(0, 15)
        error = (codes * scale.float() + offset.float() - x).square().sum(-1, keepdim=True)
        candidate = codes, scale, offset, error
        if best is None:
            best = candidate
        else:
            is_better = error < best[3]
            best = tuple(torch.where(is_better, new, old) for new, old in zip(candidate, best, strict=True))
        mean, x_mean = codes.mean(-1, keepdim=True), x.mean(-1, keepdim=True)
        variance = (codes - mean).square().sum(-1, keepdim=True)
        covariance = ((codes - mean) * (x - x_mean)).sum(-1, keepdim=True)
        scale = torch.where(variance > 0, covariance / variance.clamp(min=1e-9), scale.float())
        offset = x_mean - scale * mean
    assert best is not None
    codes, scale, offset, _ = best
    return codes, scale[..., 0], offset[..., 0]


class QuantizedExperts(nn.Module):
    """The maps of experts (`ExpertLinear`) with quantised weights: rows of one matrix, one expert after another."""

    def __init__(self, matrix: QuantizedLinear, experts: int) -> None:
        super().__init__()
        self.matrix = matrix
        self.experts = experts

    @property
    def weight(self) -> Tensor:
        """The matrices as a new tensor of floats [E D H]."""
        return self.matrix.weight.unflatten(0, (self.experts, -1)).mT

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Apply each expert's map to its rows of x, as `ExpertLinear` does."""
        if torch.compiler.is_compiling():  # the numbers of rows are not known
            return grouped_linear(x, self.weight.to(x.dtype), ends)
        size = self.matrix.out_features // self.experts
        starts = [0, *ends.tolist()]
        parts = [
            self.matrix.forward_rows(x[start:stop], slice(expert * size, (expert + 1) * size))
            for expert, (start, stop) in enumerate(pairwise(starts))
            if stop > start
        ]
        return torch.cat(parts)


WEIGHTS: Mapping[str, type[QuantizedLinear]] = {"int8": Int8Linear, "int4": Int4Linear}
"""Formats of quantised weights, by name."""
PLAIN = (nn.Linear, Linear)
"""Types of the layers that are quantised; subclasses, such as adapters, may use their weights otherwise."""


@torch.no_grad()
def quantize_model(
    model: LanguageModel, weights: str, *, on_note: Callable[[str], object] = warnings.warn
) -> LanguageModel:
    """Quantise the weights of a model in place, and set it to evaluation mode; return the model.

    Args:
        model: the model, with its final weights.
        weights: the format: "int8" or "int4".
        on_note: called with a sentence that has the bytes before and after, and the matrices that are not quantised.

    Raises:
        SeqmixError: the format is unknown, the model is quantised already or too small, or a weight is not finite.
    """
    require_name("weight format", weights, WEIGHTS)
    if (present := weights_of(model)) is not None:
        raise SeqmixError(f"the model has {present} weights already: load the run with weights={weights!r} instead")
    before = _size(model)

    def make(path: str, weight: Tensor, bias: nn.Parameter | None) -> QuantizedLinear:
        if not weight.isfinite().all():
            raise SeqmixError(f"{path}.weight has values that are not finite, which {weights} weights cannot express")
        layer = WEIGHTS[weights](weight, bias)
        layer.encode(weight)
        return layer

    kept = _replace(model, make)
    if weights_of(model) is None:
        raise SeqmixError(
            f"the model has nothing to quantise: no matrix of at least {MIN_WEIGHTS:,} weights in a linear layer; "
            "leave out --weights"
        )
    after = _size(model)
    and_others = f" and {len(kept) - 1} others" if kept[1:] else ""
    left = f"; {kept[0]}{and_others} cannot be quantised" if kept else ""
    on_note(f"{weights} weights: {_mebibytes(after)} MiB of memory instead of {_mebibytes(before)}{left}")
    return model.requires_grad_(False).eval()


def prepare_quantized(model: LanguageModel, weights: str) -> None:
    """Replace the layers that `quantize_model` quantises by layers whose codes are yet to be loaded."""
    _replace(model, lambda path, weight, bias: WEIGHTS[weights](weight, bias))  # noqa: ARG005
    model.requires_grad_(False).eval()


def weights_of(model: nn.Module) -> str | None:
    """Return the format of a model's quantised weights; None if it has none."""
    types = {type(module) for module in model.modules()}
    return next((name for name, kind in WEIGHTS.items() if kind in types), None)


def require_intact(model: nn.Module, source: object) -> None:
    """Check scales and offsets that were read from `source`, a file.

    Raises:
        SeqmixError: one of them is not finite.
    """
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            for name, tensor in zip(module.stored, module.tensors, strict=True):
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise SeqmixError(f"{source} is damaged: {path}.{name} has values that are not finite")


def _replace(model: LanguageModel, make: Callable[[str, Tensor, nn.Parameter | None], QuantizedLinear]) -> list[str]:
    """Replace the layers to quantise; return the names of other large matrices, which have no layer of their own.

    `make` is called with the path of a layer, its matrix [N K], and its bias.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    roles = {name: role.role for name, role in roles_of(model).items()}
    made: dict[nn.Module, nn.Module] = {}
    for parent_path, parent in list(model.named_modules()):
        excluded: Sequence[str] = getattr(parent, "reads_weights_of", ())
        for name, layer in list(parent.named_children()):
            if type(layer) not in (*PLAIN, ExpertLinear) or name in excluded:
                continue
            layer = cast("nn.Linear | ExpertLinear", layer)
            # a tied readout has the role of the embedding
            role = Role.READOUT if layer is model.head else roles[names[id(layer.weight)]]
            if role not in (Role.MATRIX, Role.READOUT) or layer.weight.numel() < MIN_WEIGHTS:
                continue
            if layer not in made:
                path = f"{parent_path}.{name}".lstrip(".")
                if isinstance(layer, ExpertLinear):
                    matrix = make(path, layer.weight.mT.flatten(0, 1), None)
                    made[layer] = QuantizedExperts(matrix, len(layer.weight))
                else:
                    made[layer] = make(path, layer.weight, layer.bias)
            parent.register_module(name, made[layer])
    plain = {f"{path}.weight" for path, module in model.named_modules() if type(module) in PLAIN}
    left = {name: parameter for name, parameter in model.named_parameters() if name not in plain}
    return [name for name, x in left.items() if roles.get(name) is Role.MATRIX and x.numel() >= MIN_WEIGHTS]


def _size(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"
