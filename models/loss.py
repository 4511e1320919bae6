"""Cross-entropy over a large vocabulary without all logits in memory at once."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..registry import SeqmixError
from .cpu_linear import linear

IGNORED = -100
"""Target that excludes a token from the loss."""
Reduction: TypeAlias = Literal["mean", "sum", "none"]
"""Reduction of the loss over tokens, as in F.cross_entropy."""
LOGITS_AT_ONCE: Mapping[str, int] = {"cpu": 2**24, "cuda": 2**28}
"""Maximum number of logits in memory, by type of device (64 MiB and 1 GiB in float32); more tokens are computed in
parts. Each part reads the whole weight and adds to its gradient, so a GPU is faster with few parts."""


def linear_cross_entropy(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "vocab D"],
    targets: Int[Tensor, " M"],
    reduction: Literal["sum", "none"] = "sum",
    softcap: float | None = None,
) -> Float[Tensor, "..."]:
    """Return -log softmax(hidden weight^T)[target] in nats, summed or per token; `IGNORED` targets give 0.

    With a `softcap` c, the logits become c tanh(logits / c).

    At most `LOGITS_AT_ONCE` logits are in memory, in forward and in backward. Under autocast, the product is computed
    in autocast's dtype. The softmax, and the sum of the weight's gradients over the parts, are always computed in
    float32 or wider.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    size = tokens_at_once(weight)
    if len(hidden) <= size:
        return _direct(hidden, weight, targets, reduction, softcap)
    # torch's own function computes each part's gradient in the forward pass, so it recomputes no logits. But it rounds
    # the sum to the dtype of `hidden`, which is too coarse in bfloat16, and older versions of torch do not have it
    make_options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    torch_supports = softcap is None and reduction == "sum" and hidden.dtype in (torch.float32, torch.float64)
    if torch_supports and make_options is not None:
        options = make_options(batch_chunk_size=size, chunking_method=None)
        return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", ignore_index=IGNORED, options=options)
    # each part rounds a wide weight for itself, so that autograd adds up the parts' gradients in float32
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    losses = [
        checkpoint(_direct, part, weight, target, reduction, softcap, use_reentrant=False) for part, target in parts
    ]
    return torch.cat(losses) if reduction == "none" else torch.stack(losses).sum()


def linear_predictions(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "vocab D"],
    targets: Int[Tensor, " M"],
    reduction: Literal["sum", "none"] = "sum",
    softcap: float | None = None,
) -> tuple[Float[Tensor, "..."], Int[Tensor, " M"]]:
    """Return the loss of `linear_cross_entropy`, and the most probable token at each position.

    If several tokens are equally probable, it is the first of them.
    """
    size = tokens_at_once(weight)
    losses = []
    predictions = []
    for part, target in zip(hidden.split(size), targets.split(size), strict=True):
        logits = capped(linear(part, weight), softcap)
        losses.append(_cross_entropy(logits, target, reduction))
        predictions.append(logits.argmax(-1))
    return torch.cat(losses) if reduction == "none" else torch.stack(losses).sum(), torch.cat(predictions)


def tokens_at_once(weight: Tensor) -> int:
    """Return the number of tokens whose logits are computed at once; `weight` is the output projection, [vocab D]."""
    return max(1, LOGITS_AT_ONCE.get(weight.device.type, LOGITS_AT_ONCE["cpu"]) // weight.shape[0])


def capped(logits: Float[Tensor, "*batch vocab"], softcap: float | None) -> Float[Tensor, "*batch vocab"]:
    """Return the soft-capped logits, c tanh(logits / c); unchanged for None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _direct(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, softcap: float | None) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return _cross_entropy(capped(linear(hidden, weight.to(hidden.dtype)), softcap), targets, reduction)


def _cross_entropy(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    if reduction not in ("sum", "none"):
        raise SeqmixError(f"reduction must be 'sum' or 'none' (or 'mean' in a model's call), got {reduction!r}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction=reduction)
