"""Gates: maps of low rank that gates are made of, and the norm of an output that a gate weighs."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ...registry import Config


class LowRank(nn.Module):
    """A map of low rank: act(x W1) W2, plus a bias if wanted, which starts at 0; linear but for an activation."""

    def __init__(
        self,
        width_in: int,
        rank: int,
        width_out: int,
        *,
        bias: bool,
        activation: Literal["none", "tanh", "sigmoid"] = "none",
    ) -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(width_in, rank, bias=False)
        self.up = nn.Linear(rank, width_out, bias=bias)
        self.reset_parameters()

    def forward(self, x: Float[Tensor, "*batch width_in"]) -> Float[Tensor, "*batch width_out"]:
        """The map of the last dimension."""
        low = self.down(x)
        return self.up(low if self.activation == "none" else low.tanh() if self.activation == "tanh" else low.sigmoid())

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices, and no bias."""
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.xavier_uniform_(self.up.weight)
        if self.up.bias is not None:
            nn.init.zeros_(self.up.bias)


class LowRanks(Config):
    """Ranks of the maps of RWKV-7."""

    rank: int = Field(default=32, gt=0, le=2**20, examples=[3])
    """Rank of the maps from tokens to decays and rates."""
    value_rank: int | None = Field(default=None, gt=0, le=2**20, examples=[2])
    """Rank of the map to shares of first values; `rank` when null."""
    gate_rank: int | None = Field(default=None, gt=0, le=2**20, examples=[2])
    """Rank of the output gate's map; twice `rank` when null."""

    @property
    def ranks(self) -> tuple[int, int, int]:
        """All three."""
        return self.rank, self.value_rank or self.rank, self.gate_rank or 2 * self.rank


HeadNorm = Literal["group", "rms", "none"]
"""`group`: mean and variance over the last dimension, one group per head; `rms`: root mean square alone."""
Gate = Literal["swish", "sigmoid", "none"]
"""What the output gate goes through."""


def gate_decay(logits: Float[Tensor, "*batch"], normalizer: float) -> Float[Tensor, "*batch"]:
    """Natural log of sigmoid(logits)^(1/normalizer), float32 or float64: 16 bits cannot tell 0.999 from 1."""
    return F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / normalizer


class GatedNorm(nn.Module):
    """norm(x) * weight * act(gate) over the last dimension, in the dtype of x (float32 of float16), and returned in it.

    A product of x and the gate can leave the range of float16, and its square sooner. Statistics are formed in float32
    always, and never cross tokens (nn.GroupNorm would pool over them).

    Args:
        width: of the last dimension.
        norm: which one.
        gate: what the gate goes through.
        affine: whether the norm has weights.
        eps: added to the variance or the mean square.
        heads: the last dimension but one, where each of its entries has weights of its own.
    """

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
        """Weights of 1."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "*batch D"], gate: Float[Tensor, "*batch D"] | None) -> Tensor:
        """The map; no gate where there is none."""
        wide = torch.float32 if x.dtype == torch.float16 else x.dtype
        y = x if x.dtype == wide else x.to(wide)
        weight = self.weight
        weight = None if weight is None else weight.to(wide)
        shared = weight if weight is not None and weight.ndim == 1 else None
        if self.norm == "group":
            y = F.layer_norm(y, y.shape[-1:], shared, eps=self.eps)
        elif self.norm == "rms":
            y = F.rms_norm(y, y.shape[-1:], shared, self.eps)
        if weight is not None and shared is None:
            y = y * weight
        if gate is None or self.gate == "none":
            return y
        gate = gate.to(wide)
        return y * (F.silu(gate) if self.gate == "swish" else gate.sigmoid())
