"""What a call asks of derivatives: a custom op has a formula backward and none forward."""

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ..registry import SeqmixError


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether forward-mode differentiation is under way, which a compiler does not see."""
    return not torch.compiler.is_compiling() and any(
        x is not None and unpack_dual(x).tangent is not None for x in tensors
    )


def refuse_tangents(what: str, *tensors: Tensor | None) -> None:
    """Find out that nothing is differentiated forward; torch would take a custom op's tangent for zero.

    Args:
        what: is computed, as the subject of a sentence.
        tensors: what it is computed from.

    Raises:
        SeqmixError: one of them has a tangent.
    """
    if has_tangent(*tensors):
        raise SeqmixError(f"{what} has no forward-mode differentiation, only backward")
