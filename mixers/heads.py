"""Heads: how wide one is, and the norm of its output."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .base import ContractError

HeadNorm = Literal["group", "rms", "none"]
"""`group`: mean and variance over a head's values, one group a head; `rms`: root mean square alone; without weights."""


def head_norm(x: Float[Tensor, "B T H V"], kind: HeadNorm, eps: float) -> Float[Tensor, "B T H V"]:
    """Normalise each head's values. Statistics never cross tokens or heads (nn.GroupNorm would pool over tokens)."""
    if kind == "none":
        return x
    width = (x.shape[-1],)
    return F.layer_norm(x, width, eps=eps) if kind == "group" else F.rms_norm(x, width, eps=eps)


def head_width(d_model: int, expand: float, n_heads: int, name: str) -> int:
    """The width of one head of `expand * d_model` dimensions.

    Raises:
        ContractError: the heads do not divide it.
    """
    total = round(d_model * expand)
    if abs(total - d_model * expand) > 1e-6 * d_model or total % n_heads or not total:
        raise ContractError(
            f"{n_heads} heads do not divide {name} * d_model = {expand:g} * {d_model} = {d_model * expand:g} evenly"
        )
    return total // n_heads
