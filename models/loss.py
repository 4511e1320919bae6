"""Cross-entropy of a large vocabulary without all of its logits in memory."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .onednn_linear import linear

IGNORED = -100
"""The target of a token after which nothing is to be predicted."""
LOGITS_AT_ONCE = 2**24
"""Logits in memory at most (64 MiB in float32); more tokens are taken in parts."""


def linear_cross_entropy(
    hidden: Float[Tensor, "M D"], weight: Float[Tensor, "vocab D"], targets: Int[Tensor, " M"]
) -> Float[Tensor, ""]:
    """The sum of -log softmax(hidden weight^T)[target] over the tokens, in nats; `IGNORED` targets count nothing.

    At most `LOGITS_AT_ONCE` logits exist at a time, in forward and in backward. Under autocast the product is in its
    dtype; the softmax is in float32 or wider always.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    size = max(1, LOGITS_AT_ONCE // weight.shape[0])
    if len(hidden) <= size:
        return _direct(hidden, weight, targets)
    # torch's own forms each part's gradient at once, so the logits are not formed again; it rounds the sum to the
    # dtype of `hidden`, which bfloat16 does not survive, and is newer than the oldest torch that seqmix runs with
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is not None and hidden.dtype in (torch.float32, torch.float64):
        chosen = options(batch_chunk_size=size, chunking_method=None)
        return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", ignore_index=IGNORED, options=chosen)
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    losses = [checkpoint(_direct, part, weight, target, use_reentrant=False) for part, target in parts]
    return torch.stack(losses).sum()


def linear_predictions(
    hidden: Float[Tensor, "M D"], weight: Float[Tensor, "vocab D"], targets: Int[Tensor, " M"]
) -> tuple[Float[Tensor, ""], Int[Tensor, " M"]]:
    """The sum of cross-entropies as above, and the most probable token at each place: the first one of several."""
    size = max(1, LOGITS_AT_ONCE // weight.shape[0])
    total, found = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32)), []
    for part, target in zip(hidden.split(size), targets.split(size), strict=True):
        logits = linear(part, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = total + F.cross_entropy(logits, target, reduction="sum")
        found.append(logits.argmax(-1))
    return total, torch.cat(found)


@torch.no_grad()
def token_losses(
    hidden: Float[Tensor, "M D"], weight: Float[Tensor, "vocab D"], targets: Int[Tensor, " M"]
) -> Float[Tensor, " M"]:
    """The cross-entropy of each token, in nats, 0 where the target is `IGNORED`; not all logits exist at once."""
    size = max(1, LOGITS_AT_ONCE // weight.shape[0])
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.cat([_direct(part, weight, target, "none") for part, target in parts])


def _direct(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        logits = linear(hidden, weight)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets, ignore_index=IGNORED, reduction=reduction)
