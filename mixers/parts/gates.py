"""Gates: low-rank maps, log-decays from logits, and the gated norm of an output."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ...registry import Config
from ..base.roles import Role, Roles


def fan_in_gain(layer: nn.Linear, base: nn.Linear) -> float:
    """Return the gain with which Xavier's rule falls with the fan-in alone, from the layer of muP's base model on.

    By itself it falls with the fan-out too, so that maps from a fixed rank would shrink in wider models.
    """
    base_sum, ours = base.in_features + base.out_features, layer.in_features + layer.out_features
    return (ours / base_sum * base.in_features / layer.in_features) ** 0.5


class LowRank(nn.Module):
    """A low-rank map, act(x W1) W2, with an optional bias that starts at 0 and an optional activation.

    `role` is that of the two matrices; the bias of a gate is a rate.
    """

    def __init__(
        self,
        width_in: int,
        rank: int,
        width_out: int,
        *,
        bias: bool,
        activation: Literal["none", "tanh", "sigmoid"] = "none",
        role: Role = Role.MATRIX,
    ) -> None:
        super().__init__()
        self.parameter_roles = {
            "down.weight": role,
            "up.weight": role,
            "up.bias": Role.RATE if role is Role.GATE else Role.VECTOR,
        }
        self.activation = activation
        self.down = nn.Linear(width_in, rank, bias=False)
        self.up = nn.Linear(rank, width_out, bias=bias)
        self.up_gain = 1.0
        self.reset_parameters()

    def forward(self, x: Float[Tensor, "*batch width_in"]) -> Float[Tensor, "*batch width_out"]:
        """Apply the map to the last dimension."""
        low = self.down(x)
        if self.activation == "tanh":
            low = low.tanh()
        elif self.activation == "sigmoid":
            low = low.sigmoid()
        return self.up(low)

    def scale_like(self, base: "LowRank") -> None:
        """Set the gain of the initial values for muP, see `SequenceMixer.scale_like`."""
        self.up_gain = fan_in_gain(self.up, base.up)

    def reset_parameters(self) -> None:
        """Initialise the matrices as Xavier-uniform, and the bias as 0."""
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.xavier_uniform_(self.up.weight, gain=self.up_gain)
        if self.up.bias is not None:
            nn.init.zeros_(self.up.bias)


class LowRanks(Config):
    """Ranks of the low-rank maps of RWKV-7."""

    rank: int = Field(default=32, gt=0, le=2**20, examples=[3])
    """Rank of the maps from tokens to decays and rates."""
    value_rank: int | None = Field(default=None, gt=0, le=2**20, examples=[2])
    """Rank of the map that mixes in the values of the first layer; `rank` when null."""
    gate_rank: int | None = Field(default=None, gt=0, le=2**20, examples=[2])
    """Rank of the output gate's map; twice `rank` when null."""

    @property
    def ranks(self) -> tuple[int, int, int]:
        """Ranks of the maps to decays and rates, of the value residual, and of the output gate."""
        return self.rank, self.value_rank or self.rank, self.gate_rank or 2 * self.rank


HeadNorm = Literal["group", "rms", "none"]
"""Norm of a head: `group` uses mean and variance, one group per head; `rms` only the root mean square; or `none`."""
Gate = Literal["swish", "sigmoid", "none"]
"""Activation of the output gate; `none` for no gate."""


def gate_decay(logits: Float[Tensor, "*batch"], normalizer: float) -> Float[Tensor, "*batch"]:
    """Return the natural log of the decays sigmoid(logits)^(1/normalizer), in float32 or float64.

    In 16 bits, a decay of 0.999 would round to 1.
    """
    return F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / normalizer


class GatedNorm(nn.Module):
    """Norm of the last dimension, with weights and a gate: norm(x) * weight * act(gate).

    The result has the dtype of x, except that float16 becomes float32: the product of x and the gate, and x squared,
    can leave the range of float16. Statistics are computed in float32 or wider. They never cross tokens, as those of
    nn.GroupNorm do.

    Args:
        width: size of the last dimension.
        norm: the norm.
        gate: activation of the gate.
        affine: True if the norm has weights.
        eps: constant added to the variance or the mean square.
        heads: number of heads, the size of the second to last dimension, if each head has its own weights; None if all
            share them.
    """

    parameter_roles: ClassVar[Roles] = {"weight": Role.NORM}

    def __init__(
        self, width: int, norm: HeadNorm, gate: Gate, *, affine: bool, eps: float, heads: int | None = None
    ) -> None:
        super().__init__()
        self.norm = norm
        self.gate = gate
        self.eps = eps
        shape = (width,) if heads is None else (heads, width)
        self.weight = nn.Parameter(torch.empty(shape)) if affine and norm != "none" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights as 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "*batch D"], gate: Float[Tensor, "*batch D"] | None) -> Tensor:
        """Norm x and multiply by the activated gate; None for no gate."""
        wide = torch.float32 if x.dtype == torch.float16 else x.dtype
        y = x if x.dtype == wide else x.to(wide)
        weight = self.weight
        weight = None if weight is None else weight.to(wide)
        shared_weight = weight if weight is not None and weight.ndim == 1 else None
        if self.norm == "group":
            y = F.layer_norm(y, y.shape[-1:], shared_weight, eps=self.eps)
        elif self.norm == "rms":
            y = F.rms_norm(y, y.shape[-1:], shared_weight, self.eps)
        if weight is not None and shared_weight is None:
            y = y * weight
        if gate is None or self.gate == "none":
            return y
        gate = gate.to(wide)
        return y * (F.silu(gate) if self.gate == "swish" else gate.sigmoid())
