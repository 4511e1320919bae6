"""Softmax attention: the output of a token is the average of the values up to it, weighted by a softmax of scores.

Notation: B batch, T tokens, H query heads, G key heads (head h reads key head h // (H / G)), K key width, V value
width, S slots of a cache, N packed documents, C chunk; n a query's position, m a key's, w the window, a = log_decay.

    s_nm = scale * sum_d q_nd k_md exp(a_d (n - m))          a None means 0; xPos has one decay per pair of dimensions
    o_n  = sum_m softmax_m(s_nm) v_m                         over the keys  max(0, n - w + 1) <= m <= n

With a window of w, a query sees w keys, including its own. The state is a cache of keys and values. Rows of a batch may
have read different numbers of tokens: masks follow from the positions that a cache's slots hold.

The decay exp(a (n - m)) is applied as two factors, relative to a reference r in the middle of the queries:

    exp(a (n - r)) * exp(-a (m - r))         factors of keys far before r underflow to 0, as they should

Keys are cached without their factor, so no factor depends on an absolute position.
"""

from typing import Any, Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from ...registry import SeqmixError, nearest_hint
from ..runtime.call import Call, CallOptions
from ..runtime.kernel import chosen, declare_references
from ..runtime.paradigm import Paradigm
from ..runtime.recording import record
from .inputs import AttentionInputs, AttentionOutput, require_attention, require_range
from .kv_cache import Cache, first_key
from .ring import attend_in_ring, can_attend_in_ring
from .sdpa import attend_in_blocks, softmax_chunkwise, softmax_parallel, softmax_recurrent

Backend = Literal["auto", "sdpa", "flex", "xformers"]
"""Name of a kernel backend; `auto` is resolved when a model is built; `sdpa` and `flex` are torch's own."""


class SoftmaxOptions(CallOptions, total=False):
    """Keywords of `softmax_attention`: how scores are computed, and `CallOptions` unless a `Call` is passed."""

    scale: float | None
    """Number that query-key products are multiplied by; 1/sqrt(K) by default."""
    window: int | None
    """Number of keys that a query sees, including its own; None means all."""
    log_decay: Float[Tensor, " K"] | None
    """Natural log of the decay per token of distance, for each key dimension, <= 0."""
    log_forget: Float[Tensor, "B T H"] | None
    """Natural log of each token's forget gate, <= 0 and finite."""
    slopes: Float[Tensor, " H"] | None
    """ALiBi slope: subtracted from a score per token of distance."""
    softcap: float | None
    """Soft bound of the scores, above 0: softcap * tanh(score / softcap), before gates and slopes are added."""
    sinks: Float[Tensor, " H"] | None
    """Attention sink: score of an additional key with a value of zero, one per head."""
    value_dims: int | None
    """Number of leading key dimensions that are used as the values; v is then [B T G 0]."""
    written_cache: Cache | None
    """Cache after the segment, if another call with the same k, v and initial state has returned it: nothing is
    written, and the final state is this cache."""


def softmax_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    call: Call | None = None,
    **options: Unpack[SoftmaxOptions],
) -> AttentionOutput:
    """Compute causal softmax attention with grouped heads, with or without a KV cache; parallel by default.

    In a context-parallel group, keys and values of earlier processes arrive one block at a time (ring attention). If a
    state is passed or requested, every process gathers all keys and values instead, because the state is the cache of
    the whole row. Either way the backend is ignored.

    The state is a KV cache. The final cache has the type of the initial one. Without an initial cache it is a ring of
    `window` slots if there is a window, else a growing cache; with forget gates, a `ForgettingCache` around it. A
    `RingCache` is written in place if a final state is requested, grad mode is off, documents are not packed, and there
    is no window or `donate_state` is set.

    Args:
        q: queries.
        k: keys.
        v: values.
        call: the mixer's call; None if you call the op directly, with `CallOptions` among the options. The chunkwise
            paradigm then has blocks of 512 queries, and the backend is `sdpa`.
        options: `SoftmaxOptions`.

    Raises:
        SeqmixError: shapes, dtypes or document boundaries do not match, or the backend does not support an option.
        RuntimeError: a ring cache is too small for the window, or a decay would leave the dtype's range; on a GPU and
            in compiled code, also if document boundaries are invalid. On a GPU, which runs asynchronously, the error
            appears only at a later call.
    """
    known = SoftmaxOptions.__annotations__
    if unknown := [name for name in options if name not in known]:
        raise SeqmixError(f"softmax attention has no option {unknown[0]!r}{nearest_hint(unknown[0], known)}")
    call_options: Any = {name: value for name, value in options.items() if name in CallOptions.__annotations__}
    score_options: dict[str, Any] = {name: value for name, value in options.items() if name not in call_options}
    if call is None:
        call_options = {"backend": "sdpa"} | call_options
    call = Call.resolve(call, q.shape[1], call_options, op="softmax", paradigm=Paradigm.PARALLEL, chunk_size=512)
    if score_options.get("scale") is None:
        score_options["scale"] = q.shape[-1] ** -0.5
    x = AttentionInputs(
        q, k, v, 1.0, call.state, call.documents, call.return_state, call.chunk_size, donated=call.donated
    )
    x = x._replace(**score_options)
    require_attention(x)
    if call.cp_group is not None:
        return _attend_in_group(x, call)
    result = chosen("softmax", call.paradigm, call.backend, q).function(x)
    record("softmax", v, x.log_forget, result[0])
    return result


def _attend_in_group(x: AttentionInputs, call: Call) -> AttentionOutput:
    """Compute the attention of this process's queries in a context-parallel group."""
    cp = call.cp_group
    length = x.q.shape[1]
    assert cp is not None
    x = x._replace(documents=cp.whole(x.documents, length))
    size = call.chunk_size if call.paradigm is Paradigm.CHUNKWISE else length
    if can_attend_in_ring(x):
        require_range(x.log_decay, min(call.chunk_size, length), x.q.dtype)
        return attend_in_ring(x, cp), None
    if x.value_dims is None:
        v = cp.gather_tokens(x.v)
    else:  # v is empty: values are dimensions of the keys
        v = x.v.new_empty(*x.k.shape[:1], cp.size * length, *x.v.shape[2:])
    log_forget = None if x.log_forget is None else cp.gather_tokens(x.log_forget)
    x = x._replace(k=cp.gather_tokens(x.k), v=v, log_forget=log_forget)
    require_range(x.log_decay, min(size, length), x.q.dtype)
    return attend_in_blocks(x, size, cp.start(length)), x.final()


def softmax_flops(
    paradigm: Paradigm,
    length: int,
    key_dim: int,
    value_dim: int,
    *,
    window: int | None = None,
    chunk_size: int = 512,
    context: int = 0,
) -> int:
    """Return the FLOPs of one query head's matrix products in the forward pass.

    They are counted as each paradigm computes them, including the pairs that are masked.

    Args:
        paradigm: parallel, recurrent or chunkwise.
        length: tokens of the segment.
        key_dim: K.
        value_dim: V.
        window: number of keys that a query sees, including its own; None means all.
        chunk_size: queries per block of the chunkwise paradigm.
        context: tokens read before the segment, all of them in a growing cache; with a window, the cache is a ring of
            `window` slots.
    """
    cached = 0 if context == 0 else context if window is None else window
    if paradigm is Paradigm.CHUNKWISE:
        starts = range(0, length, chunk_size)
        blocks = [(start, min(start + chunk_size, length)) for start in starts]
        pairs = sum((stop - start) * (cached + stop - first_key(start, cached, window)) for start, stop in blocks)
    elif paradigm is Paradigm.RECURRENT and cached and length == 1 and window is not None:
        pairs = cached  # the token's key is written to the ring first
    else:
        pairs = length * (cached + length)
    return 2 * pairs * (key_dim + value_dim)


# Twice the largest error in several thousand cases per function. The chunkwise paradigm rounds 16-bit gradients of keys
# and values once per block: its tolerances come from 70 blocks of one query.
TOLERANCES = {torch.float64: 1e-15, torch.float32: 4e-7, torch.bfloat16: 7e-3, torch.float16: 8e-4}

declare_references(
    "softmax",
    {
        Paradigm.PARALLEL: (softmax_parallel, TOLERANCES),
        Paradigm.RECURRENT: (softmax_recurrent, TOLERANCES),
        Paradigm.CHUNKWISE: (softmax_chunkwise, TOLERANCES | {torch.bfloat16: 9e-3, torch.float16: 1e-3}),
    },
    backend="sdpa",
)
