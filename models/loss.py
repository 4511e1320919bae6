"""Cross-entropy of a large vocabulary without all of its logits in memory."""

from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..registry import SeqmixError
from .onednn_linear import linear

IGNORED = -100
"""The target of a token whose next token is not predicted."""
Reduction: TypeAlias = Literal["mean", "sum", "none"]
"""The reduction over tokens, as F.cross_entropy names it."""
LOGITS_AT_ONCE: Mapping[str, int] = {"cpu": 2**24, "cuda": 2**28}
"""The maximum number of logits in memory, by type of device (64 MiB and 1 GiB in float32); more tokens are computed in
parts. Each part reads the whole weight and adds to its gradient, so a GPU wants few of them."""


def linear_cross_entropy(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "vocab D"],
    targets: Int[Tensor, " M"],
    reduction: Literal["sum", "none"] = "sum",
    softcap: float | None = None,
) -> Float[Tensor, "..."]:
    """-log softmax(hidden weight^T)[target] in nats, summed or one per token; `IGNORED` targets count nothing. With a
    `softcap` c, the logits are c tanh(logits / c).

    At most `LOGITS_AT_ONCE` logits are in memory, in forward and in backward. Under autocast the product is in its
    dtype; the softmax, and the sum of the parts' gradients of the weight, are in float32 or wider always.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    size = tokens_at_once(weight)
    if len(hidden) <= size:
        return _direct(hidden, weight, targets, reduction, softcap)
    # torch's own computes each part's gradient in the forward pass, so it recomputes no logits; but it rounds the sum
    # to the dtype of `hidden`, which is too coarse in bfloat16, and older versions of torch do not have it
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    plain = softcap is None and reduction == "sum" and hidden.dtype in (torch.float32, torch.float64)
    if plain and options is not None:
        chosen = options(batch_chunk_size=size, chunking_method=None)
        return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", ignore_index=IGNORED, options=chosen)
    # each part rounds the weight for itself: the gradients of the parts are added up in float32
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
    """The cross-entropy as above, and the most probable token at each place: the first one of several."""
    size = tokens_at_once(weight)
    losses = []
    found = []
    for part, target in zip(hidden.split(size), targets.split(size), strict=True):
        logits = capped(linear(part, weight), softcap)
        losses.append(_cross_entropy(logits, target, reduction))
        found.append(logits.argmax(-1))
    return torch.cat(losses) if reduction == "none" else torch.stack(losses).sum(), torch.cat(found)


def tokens_at_once(weight: Tensor) -> int:
    """The number of tokens of a part."""
    return max(1, LOGITS_AT_ONCE.get(weight.device.type, LOGITS_AT_ONCE["cpu"]) // weight.shape[0])


def capped(logits: Float[Tensor, "*batch vocab"], softcap: float | None) -> Float[Tensor, "*batch vocab"]:
    """Logits bounded by c tanh(logits / c); as they are for None."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _direct(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str, softcap: float | None) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return _cross_entropy(capped(linear(hidden, weight.to(hidden.dtype)), softcap), targets, reduction)


def _cross_entropy(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    if reduction not in ("sum", "none"):
        raise SeqmixError(f"reduction must be 'sum' or 'none' (a model has 'mean' too), and is {reduction!r}")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction=reduction)
