"""The decay family: a matrix state that decays and is written by outer products.

Notation: B batch, T tokens, H heads, K key width, V value width, C chunk, N packed documents; a = log_decay.

    S_t = diag(exp(a_t)) S_{t-1} + k_t v_t^T            state  [H K V]
    o_t = scale * q_t S_t                                the query reads the updated state

The shape of `log_decay` selects the model: None (linear attention), [H] (retention, Lightning), [B T H] (gated
retention, Mamba-2), [B T H K] (GLA, HGRN2). With gamma = exp(a), `decay_parallel` is Eq. 5 of the RetNet paper (arXiv
2307.08621), `decay_recurrent` its Eq. 6, `decay_chunkwise` its Eq. 7; rotations are the caller's.

A log-decay of -inf is legal and resets the state: sums of log-decays over a stretch are always formed by adding up that
stretch, never as the difference of two running sums, which would be inf - inf.
"""

from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...mixers.positions import document_of_token
from ...registry import SeqmixError
from ..autograd import needs_grad, refuse_tangents
from ..context_parallel import Context
from ..kernels import Kernel, Probe, chosen, declare, require_floats
from ..packing import require_borders
from ..paradigm import Paradigm
from .chunkwise import chunkwise_op
from .recurrent import no_autocast, one_step, recurrent_op

LogDecay: TypeAlias = Float[Tensor, " H"] | Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None
"""Natural logarithm of the decay, <= 0: fixed a head, or given for every token and head (and key dimension)."""

NO_TANGENTS = "a decay op of more than one token, outside the parallel paradigm,"
"""What is differentiated backward alone."""

Backend = Literal["auto", "reference", "triton", "fla"]
"""Whose kernels: `auto` is settled when a model is built; `reference` is torch's own, `triton` this library's."""


class DecayOutput(NamedTuple):
    """What a decay map returns."""

    output: Float[Tensor, "B T H V"]
    """In the dtype of the queries."""
    final_state: Float[Tensor, "N H K V"] | None
    """float32 (float64 for float64 inputs); None unless wanted."""


def decay(
    paradigm: Paradigm,
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: LogDecay,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
    chunk_size: int = 128,
    backend: str = "reference",
    context: Context | None = None,
) -> DecayOutput:
    """The map in any paradigm, by a backend's kernel; arguments and result are those of `decay_chunkwise`.

    With a context, tokens are this rank's, borders and states those of the whole row. The map is then computed twice:
    from no state, for what the segment writes, and from the state that the segments before it leave.
    """
    chunks = {"chunk_size": chunk_size} if paradigm is Paradigm.CHUNKWISE else {}
    compute = partial(chosen("decay", paradigm, backend).function, k=k, v=v, log_decay=log_decay, scale=scale, **chunks)
    if context is None:
        return compute(q, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens)
    length, borders = q.shape[1], context.borders(cu_seqlens, q.shape[1])
    _, written = compute(k.detach(), output_final_state=True, cu_seqlens=borders)
    written = context.last_row(written, cu_seqlens, length)
    counted = None if cu_seqlens is None else context.last_tokens(cu_seqlens, length)
    kept = _kept(k, log_decay, counted).to(written.dtype)
    state = context.entry(kept, written, initial_state, cu_seqlens, length, torch.mul)
    output, final_state = compute(q, initial_state=state, output_final_state=output_final_state, cu_seqlens=borders)
    return DecayOutput(output, None if final_state is None else context.final(final_state, cu_seqlens, length))


def decay_parallel(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: LogDecay,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
) -> DecayOutput:
    """All tokens at once: o = (q k^T * D) v + (what is left of the initial state). Quadratic in T.

    Arguments and result are those of `decay_chunkwise`.
    """
    scale = require_inputs(q, k, v, log_decay, scale, initial_state, cu_seqlens)
    length, wide = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    token = torch.arange(length, device=q.device)
    causal = token[:, None] >= token
    if cu_seqlens is None:
        document = torch.zeros_like(token)
    else:
        document = document_of_token(cu_seqlens, length)
        causal = causal & (document[:, None] == document)
    # a product of reduced precision is as good as a kernel's; decays and states are not reduced
    with no_autocast(q.device):
        q, k, v = ((q if scale == 1 else scale * q).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        a = None if log_decay is None else _per_token(log_decay.to(wide), length)  # [1|B H T 1|K]
        if log_decay is not None and log_decay.ndim == 1:
            decay = _fixed_decay(log_decay.to(wide), token[:, None] - token, causal)
            scores = ((q @ k.transpose(2, 3)) * decay).to(v.dtype)
        else:
            scores = _pair_scores(q, k, a, causal).to(v.dtype)
        output = (scores @ v).to(wide)
        if initial_state is not None:
            query = q.to(wide) if a is None else q.to(wide) * _sum_where(causal, a).exp()
            state = initial_state.to(wide)
            if cu_seqlens is None:
                output = output + query @ state
            else:
                by_document = _one_hot(document, cu_seqlens, wide)
                output = output + torch.einsum("nt,bhtk,nhkv->bhtv", by_document, query, state)
        final_state = None
        if output_final_state:
            final_state = _final_state(k.to(wide), v.to(wide), a, initial_state, document, cu_seqlens, causal)
    return DecayOutput(output.to(q.dtype).transpose(1, 2), final_state)


def decay_recurrent(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: LogDecay,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
) -> DecayOutput:
    """Token by token, by the definition. One token costs the same at every position: decoding.

    Arguments and result are those of `decay_chunkwise`.
    """
    scale = require_inputs(q, k, v, log_decay, scale, initial_state, cu_seqlens)
    if q.shape[1] > 1 or cu_seqlens is not None:
        refuse_tangents(NO_TANGENTS, q, k, v, log_decay, initial_state)
        output, final_state, _ = recurrent_op(
            q, k, v, log_decay, initial_state, cu_seqlens, scale, needs_grad(q, k, v, log_decay, initial_state)
        )
        return DecayOutput(output, final_state if output_final_state else None)
    # plain operations, which a compiler fuses with what surrounds them
    output, state = one_step(q, k, v, log_decay, scale, initial_state)
    return DecayOutput(output, state if output_final_state else None)


def decay_chunkwise(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: LogDecay,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
    chunk_size: int = 128,
) -> DecayOutput:
    """Parallel inside chunks, recurrent between them. Linear in T, in time and memory, forward and backward.

    Args:
        q: queries.
        k: keys.
        v: values.
        log_decay: natural log of the decay, <= 0, -inf allowed; None means no decay.
        scale: factor of the output, 1/sqrt(K) by default.
        initial_state: state before the first token; it decays before the first token is added. None means zero.
        output_final_state: whether the state after the last token is wanted.
        cu_seqlens: borders of N documents packed into one row (B = 1); states then have N rows.
        chunk_size: tokens a chunk; changes the cost, never the result.

    Raises:
        SeqmixError: shapes or dtypes do not fit, said in one sentence.
    """
    scale = require_inputs(q, k, v, log_decay, scale, initial_state, cu_seqlens, chunk_size)
    refuse_tangents(NO_TANGENTS, q, k, v, log_decay, initial_state)
    output, final_state, _ = chunkwise_op(
        q,
        k,
        v,
        log_decay,
        initial_state,
        cu_seqlens,
        scale,
        chunk_size,
        output_final_state,
        needs_grad(q, k, v, log_decay, initial_state),
    )
    return DecayOutput(output, final_state if output_final_state else None)


def _kept(k: Tensor, log_decay: Tensor | None, counted: Tensor | None) -> Tensor:
    """What a segment leaves of a state, the decays of the counted tokens (all, if None) multiplied: [1|B H 1|K 1]."""
    if log_decay is None:
        return k.new_ones(1, k.shape[2], 1, 1)
    wide = torch.promote_types(log_decay.dtype, torch.float32)
    a = _per_token(log_decay.to(wide), k.shape[1])
    if counted is not None:
        a = torch.where(counted[:, None], a, 0)
    return a.sum(2)[..., None].exp()


def _per_token(a: Tensor, length: int) -> Tensor:
    """A log-decay of any shape as [1|B H T 1|K]."""
    if a.ndim == 1:
        return a[None, :, None, None].expand(1, -1, length, 1)
    return (a if a.ndim == 4 else a[..., None]).transpose(1, 2)


def _sum_where(mask: Tensor, a: Tensor) -> Tensor:
    """out[i] = the sum of the a[l] with mask[i, l]: [I L], [.. L K] -> [.. I K]."""
    return torch.where(mask[..., None], a[..., None, :, :], 0).sum(-2)


def _fixed_decay(log_decay: Tensor, distance: Tensor, causal: Tensor) -> Tensor:
    """D_ij = gamma^(i - j) where j is seen by i, else 0: [H T T]."""
    exponent = torch.where(distance == 0, 0, distance * log_decay[:, None, None])  # 0 * -inf is nan
    return exponent.masked_fill(~causal, float("-inf")).exp()


def _pair_scores(q: Tensor, k: Tensor, a: Tensor | None, causal: Tensor) -> Tensor:
    """q_i k_j^T times the decay from j to i: [B H T T]."""
    if a is None:
        return (q @ k.transpose(2, 3)).masked_fill(~causal, 0)
    length = causal.shape[0]
    later = torch.ones(length, length, dtype=torch.bool, device=a.device).tril(-1)
    # entry [i, j] adds a[l] for j < l <= i
    stretch = torch.where(later[..., None], a[..., None, :], 0).cumsum(-3)
    decay = stretch.masked_fill(~causal[..., None], float("-inf")).exp()  # [1|B H T T 1|K]
    if decay.shape[-1] == 1:
        return (q @ k.transpose(2, 3)) * decay[..., 0]
    return torch.einsum("bhik,bhjk,bhijk->bhij", q.to(decay.dtype), k.to(decay.dtype), decay)


def _one_hot(document: Tensor, cu_seqlens: Tensor, dtype: torch.dtype) -> Tensor:
    """[N T], one where a token belongs to a document."""
    return (torch.arange(len(cu_seqlens) - 1, device=document.device)[:, None] == document).to(dtype)


def _final_state(
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    initial_state: Tensor | None,
    document: Tensor,
    cu_seqlens: Tensor | None,
    causal: Tensor,
) -> Tensor:
    if a is not None:
        after = causal.T & ~torch.eye(len(document), dtype=torch.bool, device=k.device)
        k = k * _sum_where(after, a).exp()
    if cu_seqlens is None:
        state = k.transpose(2, 3) @ v
        if initial_state is not None:
            kept = initial_state.to(k.dtype)
            state = state + (kept if a is None else kept * a.sum(2)[..., None].exp())
        return state
    by_document = _one_hot(document, cu_seqlens, k.dtype)
    state = torch.einsum("nt,bhtk,bhtv->nhkv", by_document, k, v)
    if initial_state is not None:
        kept = initial_state.to(k.dtype)
        if a is not None:
            total = _sum_where(by_document.bool(), a)[0].transpose(0, 1)  # [N H 1|K]
            kept = kept * total[..., None].exp()
        state = state + kept
    return state


def require_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int = 1,
) -> float:
    """Refuse what no kernel of the family takes: shapes and dtypes that do not fit, chunks without tokens.

    Returns:
        The scale, 1/sqrt(K) where None was given.

    Raises:
        SeqmixError: what does not fit.
    """
    require_floats(q, k, v)
    if q.ndim != 4 or q.shape != k.shape or v.shape[:3] != q.shape[:3] or q.shape[1] < 1:
        raise SeqmixError(
            "q and k must be [B T H K] and v [B T H V] with T >= 1; "
            f"given are {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    batch, length, heads, key_width = q.shape
    if log_decay is not None and tuple(log_decay.shape) not in (
        (heads,),
        (batch, length, heads),
        (batch, length, heads, key_width),
    ):
        raise SeqmixError(
            f"log_decay must be None, [H], [B T H] or [B T H K] with B, T, H, K = {batch}, {length}, {heads}, "
            f"{key_width}; given is {list(log_decay.shape)}"
        )
    if cu_seqlens is not None and batch != 1:
        raise SeqmixError(f"packed documents are one row (B = 1), and the batch is {batch}")
    if cu_seqlens is not None:
        require_borders(cu_seqlens, length)
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is not None and tuple(initial_state.shape) != (rows, heads, key_width, v.shape[3]):
        raise SeqmixError(
            f"the initial state must be {[rows, heads, key_width, v.shape[3]]}, and is {list(initial_state.shape)}"
        )
    if chunk_size < 1:
        raise SeqmixError(f"chunk_size must be at least 1, and is {chunk_size}")
    return key_width**-0.5 if scale is None else scale


def probe_of(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None) -> Probe:
    """What a call asks of a kernel."""
    names = {1: "H", 3: "B T H", 4: "B T H K"}
    return Probe(
        device=q.device,
        dtype=q.dtype,
        key_width=q.shape[3],
        value_width=v.shape[3],
        log_decay=None if log_decay is None else names[log_decay.ndim],
        needs_grad=needs_grad(q, k, v, log_decay, initial_state),
    )


def decay_flops(
    paradigm: Paradigm,
    length: int,
    key_width: int,
    value_width: int,
    *,
    chunk_size: int = 128,
    context: int = 0,
    key_decays: bool = False,
) -> int:
    """Operations of one head's matrix products, forward, as each paradigm computes them (masked squares in full).

    Args:
        paradigm: how it is computed.
        length: tokens of the segment.
        key_width: K.
        value_width: V.
        chunk_size: tokens a chunk.
        context: tokens read before; any adds the product with the initial state.
        key_decays: whether log_decay is [B T H K], whose chunks form products of queries and keys by halves.
    """
    per_pair, per_state = 2 * (key_width + value_width), 2 * key_width * value_width
    if paradigm is Paradigm.RECURRENT:
        return 2 * length * per_state
    if paradigm is Paradigm.PARALLEL:
        return length * length * per_pair + (length * per_state if context else 0)
    whole, ragged = divmod(length, chunk_size)
    squares = whole * chunk_size**2 + ragged**2
    pairs = whole * _halved(chunk_size) + _halved(ragged) if key_decays else squares
    inside = 2 * (pairs * key_width + squares * value_width)
    # every chunk but the first reads a state, every chunk but the last writes one
    last = ragged or chunk_size
    read = length if context else length - min(length, chunk_size)
    return inside + (read + length - last) * per_state


def _halved(tokens: int) -> int:
    """Pairs of tokens that are formed by halves: those of different tokens, once, of as many as a power of two."""
    size = 1 << max(tokens - 1, 0).bit_length()
    return size * (size - 1) // 2


# Twice the worst of several thousand cases a function, or, where that is more, what exp makes of exponents that do not
# underflow: an error of 87 roundings in float32, of 708 in float64. The parallel form rounds its scores to 16 bits.
TOLERANCES = {torch.float64: 2e-13, torch.float32: 1e-5, torch.bfloat16: 7e-3, torch.float16: 9e-4}

declare(
    Kernel(
        op="decay",
        paradigm=Paradigm.PARALLEL,
        backend="reference",
        function=decay_parallel,
        tolerances=TOLERANCES | {torch.bfloat16: 1.5e-2, torch.float16: 1.8e-3},
        reference=True,
    )
)
declare(
    Kernel(
        op="decay",
        paradigm=Paradigm.RECURRENT,
        backend="reference",
        function=decay_recurrent,
        tolerances=TOLERANCES,
        reference=True,
    )
)
declare(
    Kernel(
        op="decay",
        paradigm=Paradigm.CHUNKWISE,
        backend="reference",
        function=decay_chunkwise,
        tolerances=TOLERANCES,
        reference=True,
    )
)
