"""Scores of keys, and the selection by them: the same bits in every paradigm, however a text is cut.

A choice is discontinuous: one rounding may change it, and with it the output. A matrix product rounds in an order that
depends on the shapes, so its numbers differ between a whole text and its pieces. Here nothing depends on an order:

    x ~ 2^e round(x / 2^e * 2^b)    integers of b bits per vector, relative to the power of two of its largest number
    q . k = sum_d q_d k_d           a sum of integers below 2^53, which float64 holds exactly in any order

b is 23 or 24 for keys of 8 to 128 dimensions, the precision of float32. So the score of a query and a key is a function
of these two vectors alone: of no batch, length, block, thread or device, and of no fused multiply-add. The integers
also absorb the last bits of float64 in which projections of equal tokens may differ. All that follows is element by
element, or a sum in an order that padding does not change (`tree_sum`). Scores are ranked as float32; ties go to the
lower index.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..recurrence.token_loop import no_autocast

MANTISSA = 53
"""Bits of the largest integer up to which float64 holds all integers."""
EXPONENT = 0x7FF << 52
"""Bits of a float64 number that are its exponent."""
SMALLEST = 2.0**-960
"""Power of two that stands for those of smaller vectors, such as vectors of zeros."""
LEAST = torch.iinfo(torch.int64).min
"""Rank of what cannot be chosen."""


@torch.no_grad()
def exact_products(q: Float[Tensor, "*batch T K"], k: Float[Tensor, "*batch M K"]) -> Float[Tensor, "*batch T M"]:
    """Return q . k in float64 without any rounding that depends on shapes; it has no gradient."""
    bits = (MANTISSA - (q.shape[-1] - 1).bit_length()) // 2
    (queries, query_unit), (keys, key_unit) = _integers(q, bits), _integers(k, bits)
    with no_autocast(q.device):
        return (queries @ keys.mT) * (query_unit * key_unit.mT)


def _integers(x: Float[Tensor, "*batch K"], bits: int) -> tuple[Tensor, Tensor]:
    """Return vectors as integers of magnitude 2^bits at most, in float64, and the unit of each vector, [*batch 1]."""
    x = x.double()
    largest = x.abs().amax(-1, keepdim=True)
    power = (largest.view(torch.int64) & EXPONENT).view(torch.float64).clamp(min=SMALLEST)
    return (x * (2.0 ** (bits - 1) / power)).round(), power * 2.0 ** (1 - bits)


def tree_sum(x: Tensor, dim: int = -1) -> Tensor:
    """Return the sum over a dimension, neighbour by neighbour; zeros at its end change no bit."""
    while (size := x.shape[dim]) > 1:
        pairs = x.narrow(dim, 0, size // 2 * 2)
        even, odd = pairs.unflatten(dim, (-1, 2)).unbind(dim if dim < 0 else dim + 1)
        halved = even + odd
        x = torch.cat((halved, x.narrow(dim, size - 1, 1)), dim=dim) if size % 2 else halved
    return x.squeeze(dim)


def exact_softmax(scores: Float[Tensor, "*batch P"], visible: Bool[Tensor, "*batch P"]) -> Float[Tensor, "*batch P"]:
    """Return the softmax over what is visible, by `tree_sum`; 0 if nothing is."""
    scores = scores.masked_fill(~visible, -torch.inf)
    largest = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - largest).exp()
    return weights / tree_sum(weights)[..., None].clamp(min=torch.finfo(scores.dtype).tiny)


@torch.no_grad()
def select_topk(
    scores: Float[Tensor, "*batch T P"], allowed: Bool[Tensor, "*batch T P"], number: int
) -> tuple[Int[Tensor, "*batch T n"], Bool[Tensor, "*batch T n"]]:
    """Return the indices of the `number` highest scores that are allowed, best first, and which of them exist.

    Scores are compared as float32; of equal ones, the lower index comes first.
    """
    narrow = scores.float()
    bits = torch.where(narrow == 0, 0.0, narrow).view(torch.int32).long()  # -0 equals 0
    ordered = bits ^ ((bits >> 63) & 0x7FFFFFFF)  # integers in the order of the floats
    unique = ordered * 2**32 - torch.arange(scores.shape[-1], device=scores.device)
    best = torch.where(allowed, unique, LEAST).topk(min(number, scores.shape[-1]), dim=-1)
    return best.indices, best.values > LEAST
