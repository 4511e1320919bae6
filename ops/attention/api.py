"""Softmax attention: every query reads the keys up to its own, weighted by the softmax of their products.

Notation: B batch, T tokens, H query heads, G key heads (head h reads key head h // (H / G)), K key width, V value
width, S slots of a cache, N packed documents, C chunk; n a query's position, m a key's, w the window, a = log_decay.

    s_nm = scale * sum_d q_nd k_md exp(a_d (n - m))          a None means 0; xPos has a decay a pair of dimensions
    o_n  = sum_m softmax_m(s_nm) v_m                         over the keys  max(0, n - w + 1) <= m <= n

A window of w means that a query sees w keys, its own included. The state is a cache of keys and values, and rows of a
batch may have read different numbers of tokens: what a query sees is decided by the positions that slots hold.

The decay of a pair is a product of two factors relative to a reference r, the middle of the queries at hand:

    exp(a (n - r)) * exp(-a (m - r))         keys far before r underflow to 0, which is their limit

Keys are cached without their factor, so no factor ever depends on an absolute position.
"""

from typing import Any, Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from ...registry import SeqmixError, nearest
from ..runtime.call import Call, CallOptions
from ..runtime.kernel import chosen, declare_references
from ..runtime.paradigm import Paradigm
from ..runtime.recording import record
from .inputs import AttentionInputs, AttentionOutput, require_attention, require_range
from .kv_cache import first_key
from .ring import attend_in_ring, can_ring
from .sdpa import attend_in_blocks, softmax_chunkwise, softmax_parallel, softmax_recurrent

Backend = Literal["auto", "sdpa", "flex", "xformers"]
"""The kernel backend: `auto` is resolved when a model is built; `sdpa` and `flex` are torch's."""


class SoftmaxOptions(CallOptions, total=False):
    """What changes scores; a mixer passes a `Call` in the place of the options of a call."""

    scale: float | None
    """Factor of the scores, 1/sqrt(K) by default."""
    window: int | None
    """Keys that a query sees, its own included; None means all."""
    log_decay: Float[Tensor, " K"] | None
    """Natural log of the decay per token of distance, for each key dimension, <= 0."""
    log_forget: Float[Tensor, "B T H"] | None
    """Natural log of each token's forget gate, <= 0 and finite."""
    slopes: Float[Tensor, " H"] | None
    """ALiBi slope: subtracted from a score per token of distance."""
    softcap: float | None
    """Bound of the scores before gates and slopes, above 0."""
    sinks: Float[Tensor, " H"] | None
    """Score of one more key, without a value."""
    value_dims: int | None
    """Number of leading key dimensions that are the values; v is then [B T G 0]."""


def softmax_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    call: Call | None = None,
    **options: Unpack[SoftmaxOptions],
) -> AttentionOutput:
    """Causal softmax attention of grouped heads, with or without a KV cache; parallel by default.

    In a context-parallel group keys and values come from the processes before, one block at a time (ring.py); a state
    is of all of them, so where one is given or wanted, every process gathers them. Neither asks the backend.

    Args:
        q: queries.
        k: keys.
        v: values.
        call: the call of a mixer; None for those who call the op by itself, with `CallOptions` among the options. The
            chunkwise paradigm then has blocks of 512 queries, and the backend is `sdpa`.
        options: what changes scores, `SoftmaxOptions`, and `CallOptions`. The state is a KV cache. A `RingCache` is
            written in place if a final state is wanted and grad mode is off, except with packed documents; a state is
            never written in grad mode. The final state is of the kind of the initial one; without one, a ring of
            `window` slots under a window, else a growing cache; under forget gates a `ForgettingCache` of it.

    Raises:
        SeqmixError: shapes, dtypes or the documents' boundaries do not fit, or the backend has not all of it.
        RuntimeError: what only tensors know does not fit, raised in the device's own time: a ring that would drop keys
            which later queries see, a decay whose factors would leave the dtype's range; on a GPU and in compiled code
            the boundaries too.
    """
    known = SoftmaxOptions.__annotations__
    if unknown := [name for name in options if name not in known]:
        raise SeqmixError(f"softmax has no option {unknown[0]!r}{nearest(unknown[0], known)}")
    own: Any = {name: value for name, value in options.items() if name in CallOptions.__annotations__}
    scores: dict[str, Any] = {name: value for name, value in options.items() if name not in own}
    if call is None:
        own = {"backend": "sdpa"} | own
    call = Call.given(call, q.shape[1], own, paradigm=Paradigm.PARALLEL, chunk_size=512)
    if scores.get("scale") is None:
        scores["scale"] = q.shape[-1] ** -0.5
    x = AttentionInputs(
        q, k, v, 1.0, call.state, call.documents, call.return_state, call.chunk_size, donated=call.donated
    )
    x = x._replace(**scores)
    require_attention(x)
    if call.cp_group is not None:
        return _over_ranks(x, call)
    result = chosen("softmax", call.paradigm, call.backend).function(x)
    record("softmax", v, x.log_forget, result[0])
    return result


def _over_ranks(x: AttentionInputs, call: Call) -> AttentionOutput:
    cp = call.cp_group
    length = x.q.shape[1]
    assert cp is not None
    x = x._replace(documents=cp.whole(x.documents, length))
    size = call.chunk_size if call.paradigm is Paradigm.CHUNKWISE else length
    if can_ring(x):
        require_range(x.log_decay, min(call.chunk_size, length), x.q.dtype)
        return attend_in_ring(x, cp), None
    x = x._replace(
        k=cp.gather_tokens(x.k),
        v=cp.gather_tokens(x.v)
        if x.value_dims is None
        else x.v.new_empty(*x.k.shape[:1], cp.size * length, *x.v.shape[2:]),
        log_forget=None if x.log_forget is None else cp.gather_tokens(x.log_forget),
    )
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
    """Operations of one query head's matrix products, forward, as each paradigm computes them (masked pairs count).

    Args:
        paradigm: how it is computed.
        length: tokens of the segment.
        key_dim: K.
        value_dim: V.
        window: keys that a query sees, its own included.
        chunk_size: queries per block.
        context: tokens read before; a growing cache holds them all, under a window a ring has `window` slots.
    """
    cached = 0 if context == 0 else context if window is None else window
    if paradigm is Paradigm.CHUNKWISE:
        starts = range(0, length, chunk_size)
        blocks = [(start, min(start + chunk_size, length)) for start in starts]
        pairs = sum((stop - start) * (cached + stop - first_key(start, cached, window)) for start, stop in blocks)
    elif paradigm is Paradigm.RECURRENT and cached and length == 1 and window is not None:
        pairs = cached  # the token's key is in the ring by then
    else:
        pairs = length * (cached + length)
    return 2 * pairs * (key_dim + value_dim)


# Twice the worst of several thousand cases per function. In blocks, gradients of keys and values in 16 bits are rounded
# once per block: 70 blocks of one query make that tolerance.
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
