"""Gates: maps of low rank that gates are made of, and the norm of an output that a gate weighs."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class LowRank(nn.Module):
    """A linear map by way of a narrow layer: x W1 W2, plus a bias if wanted.

    Args:
        width_in: width of x.
        rank: width between the two matrices.
        width_out: width of the result.
        bias: whether the result has a bias; it starts at 0.
    """

    def __init__(self, width_in: int, rank: int, width_out: int, *, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, rank, bias=False)
        self.up = nn.Linear(rank, width_out, bias=bias)
        self.reset_parameters()

    def forward(self, x: Float[Tensor, "*batch width_in"]) -> Float[Tensor, "*batch width_out"]:
        """The map of the last dimension."""
        return self.up(self.down(x))

    def reset_parameters(self) -> None:
        """Xavier-uniform matrices, and no bias."""
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.xavier_uniform_(self.up.weight)
        if self.up.bias is not None:
            nn.init.zeros_(self.up.bias)

    def flops(self, length: int) -> int:
        """Floating-point operations of the matrix products over `length` tokens."""
        return 2 * length * (self.down.weight.numel() + self.up.weight.numel())


def gated_norm(
    x: Float[Tensor, "*batch D"],
    gate: Float[Tensor, "*batch D"],
    weight: Float[Tensor, " D"] | None,
    eps: float,
    order: Literal["norm_first", "gate_first"],
) -> Float[Tensor, "*batch D"]:
    """RMS norm over the last dimension, with a swish gate: computed in float32 (or float64), returned in x's dtype.

    Args:
        x: what is normed.
        gate: the gate before its swish.
        weight: the norm's weight; None is 1.
        eps: added to the mean square.
        order: `norm_first`: rms(x) * weight * silu(gate); `gate_first`: rms(x * silu(gate)) * weight, as Mamba-2.
    """
    # a product of x and the gate can leave the range of float16, and its square sooner
    wide = torch.promote_types(x.dtype, torch.float32)
    y, gate = x.to(wide), F.silu(gate.to(wide))
    weight = None if weight is None else weight.to(wide)
    if order == "gate_first":
        return F.rms_norm(y * gate, x.shape[-1:], weight, eps).to(x.dtype)
    return (F.rms_norm(y, x.shape[-1:], weight, eps) * gate).to(x.dtype)
