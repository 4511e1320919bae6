"""Softmax attention with explicit scores, for options that torch's SDPA lacks (notation of api.py).

    w_nm = exp(s_nm - L_n)          L_n = log sum_m exp(s_nm)          o_n = sigmoid(L_n - sink) sum_m w_nm v_m

Everything is computed in float32 or wider: in bfloat16 a score of 30 has a rounding error of up to 0.06.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..recurrence.token_loop import no_autocast
from .inputs import AttentionInputs


def needs_weights(x: AttentionInputs, bias: Tensor | None) -> bool:
    """Return True if SDPA cannot compute a call correctly, or only slowly.

    SDPA has no softcap, no sinks and no fused kernel for keys and values of different widths. A bias wider than 16-bit
    queries works on CPUs, but GPU kernels reject it, or read its bytes as 16-bit numbers.
    """
    return (
        x.softcap is not None
        or x.sinks is not None
        or x.value_dims is not None
        or (bias is not None and bias.dtype != x.q.dtype)
    )


def attend_by_scores(
    x: AttentionInputs,
    q: Float[Tensor, "B T H K"],
    keys: Float[Tensor, "B M G K"],
    values: Float[Tensor, "B M G V"],
    visible: Bool[Tensor, "_ 1 T M"],
    bias: Float[Tensor, "_ H T M"] | None,
) -> Float[Tensor, "B T H V"]:
    """Return the attention output of queries over keys and values; softcap and sinks are those of `x`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    n_heads = q.shape[2]
    groups = keys.shape[2]
    with no_autocast(q.device):
        scores = mask_scores(x, query_key_products(x, q, keys), visible, bias)
        output = matmul(group_heads(scores.softmax(-1), groups), values.transpose(1, 2).to(wide))
        output = ungroup_heads(output, n_heads)
        if x.sinks is not None:
            # not sigmoid: its backward pass computes 1 - sigmoid by subtraction, which loses digits near 1
            share = logsigmoid(scores.logsumexp(-1) - x.sinks[:, None].to(wide)).exp()
            output = output * share[..., None]
    return output.transpose(1, 2).to(q.dtype)


def query_key_products(
    x: AttentionInputs, q: Float[Tensor, "B T H K"], keys: Float[Tensor, "B M G K"]
) -> Float[Tensor, "B H T M"]:
    """Return scale * q . k, or with a softcap tanh(scale * q . k / softcap). Autocast must be off."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = x.scale if x.softcap is None else x.scale / x.softcap
    queries = group_heads(q.transpose(1, 2).to(wide) * scale, keys.shape[2])
    products = ungroup_heads(matmul(queries, keys.permute(0, 2, 3, 1).to(wide)), q.shape[2])
    return products if x.softcap is None else products.tanh_()  # in place: no backward pass needs the products


def mask_scores(
    x: AttentionInputs,
    products: Float[Tensor, "B H T M"],
    visible: Bool[Tensor, "_ 1 T M"],
    bias: Float[Tensor, "_ H T M"] | None,
) -> Float[Tensor, "B H T M"]:
    """Return the scores from the result of `query_key_products`, which may be overwritten; -inf where masked."""
    scores = products if x.softcap is None else products * x.softcap
    return (scores if bias is None else scores.add_(bias)).masked_fill_(~visible, -torch.inf)


def group_heads(y: Float[Tensor, "B H T _"], groups: int) -> Float[Tensor, "B G N _"]:
    """Merge the query heads that share a key head into rows of one matrix, N = T H / G."""
    return y.unflatten(1, (groups, -1)).flatten(2, 3)


def ungroup_heads(y: Float[Tensor, "B G N _"], n_heads: int) -> Float[Tensor, "B H T _"]:
    """Split rows of one matrix per key head into query heads again; the inverse of `group_heads`."""
    return y.unflatten(2, (n_heads // y.shape[1], -1)).flatten(1, 2)


def matmul(x: Float[Tensor, "B G N M"], y: Float[Tensor, "B G M O"]) -> Float[Tensor, "B G N O"]:
    """Return x @ y.

    On a CPU it multiplies batch row by batch row: torch's batched product would copy y if its heads are strided
    differently from its rows, as in a cache.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.shape[0] == 1:
        return x @ y
    return torch.stack([a @ b for a, b in zip(x, y, strict=True)])
