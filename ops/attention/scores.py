"""Softmax attention by its scores, written out, where torch's SDPA has no word for it (notation of api.py).

    w_nm = exp(s_nm - L_n)          L_n = log sum_m exp(s_nm)          o_n = sigmoid(L_n - sink) sum_m w_nm v_m

All in float32 or wider: in bfloat16 a score of 30 is rounded by up to 0.06.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..recurrence.token_loop import no_autocast
from .inputs import AttentionInputs


def needs_weights(x: AttentionInputs, bias: Tensor | None) -> bool:
    """Whether SDPA cannot compute a call, or not well.

    It has neither caps nor sinks, and no fused kernel for two widths. Beside queries of 16 bits it takes a wider bias,
    but not everywhere: kernels of GPUs refuse it, or read its bytes as numbers of 16 bits.
    """
    return (
        x.softcap is not None
        or x.sinks is not None
        or x.value_dims is not None
        or (bias is not None and bias.dtype != x.q.dtype)
    )


def weighed(
    x: AttentionInputs,
    q: Float[Tensor, "B T H K"],
    keys: Float[Tensor, "B M G K"],
    values: Float[Tensor, "B M G V"],
    seen: Bool[Tensor, "_ 1 T M"],
    bias: Float[Tensor, "_ H T M"] | None,
) -> Float[Tensor, "B T H V"]:
    """What queries read of keys and values; the cap and the sinks are the call's."""
    wide, (n_heads, groups) = torch.promote_types(q.dtype, torch.float32), (q.shape[2], keys.shape[2])
    with no_autocast(q.device):
        found = scores(x, products(x, q, keys), seen, bias)
        output = by_head(product(by_group(found.softmax(-1), groups), values.transpose(1, 2).to(wide)), n_heads)
        if x.sinks is not None:
            # sigmoid, whose own backward pass forms 1 - sigmoid by subtraction
            share = logsigmoid(found.logsumexp(-1) - x.sinks[:, None].to(wide)).exp()
            output = output * share[..., None]
    return output.transpose(1, 2).to(q.dtype)


def products(
    x: AttentionInputs, q: Float[Tensor, "B T H K"], keys: Float[Tensor, "B M G K"]
) -> Float[Tensor, "B H T M"]:
    """scale q . k, or under a cap the tanh of its share of the cap; not under autocast."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = x.scale if x.softcap is None else x.scale / x.softcap
    queries = by_group(q.transpose(1, 2).to(wide) * scale, keys.shape[2])
    found = by_head(product(queries, keys.permute(0, 2, 3, 1).to(wide)), q.shape[2])
    return found if x.softcap is None else found.tanh_()  # in place where no backward pass needs what was there


def scores(
    x: AttentionInputs,
    found: Float[Tensor, "B H T M"],
    seen: Bool[Tensor, "_ 1 T M"],
    bias: Float[Tensor, "_ H T M"] | None,
) -> Float[Tensor, "B H T M"]:
    """The scores of `products`, which may be overwritten; -inf where a key is not seen."""
    found = found if x.softcap is None else found * x.softcap
    return (found if bias is None else found.add_(bias)).masked_fill_(~seen, -torch.inf)


def by_group(y: Float[Tensor, "B H T _"], groups: int) -> Float[Tensor, "B G N _"]:
    """The heads that share a key are rows of one product."""
    return y.unflatten(1, (groups, -1)).flatten(2, 3)


def by_head(y: Float[Tensor, "B G N _"], n_heads: int) -> Float[Tensor, "B H T _"]:
    """Undoes it."""
    return y.unflatten(2, (n_heads // y.shape[1], -1)).flatten(1, 2)


def product(x: Float[Tensor, "B G N M"], y: Float[Tensor, "B G M O"]) -> Float[Tensor, "B G N O"]:
    """x @ y; on a CPU row by row, as torch copies y where its heads do not lie in the order of the batch: a cache's."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.shape[0] == 1:
        return x @ y
    return torch.stack([a @ b for a, b in zip(x, y, strict=True)])
