"""The delta family: a matrix state in which a key's value is replaced, not added to (the delta rule).

Notation: B batch, T tokens, H heads, K key width, V value width, C chunk, N packed documents; a = log_decay, b = beta.

    S_t = exp(a_t) (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T       state  [H K V]
        = P_t + b_t k_t (v_t - k_t^T P_t),  P_t = exp(a_t) S_{t-1}   the prediction is that of the decayed state
    o_t = scale * q_t S_t                                            the query reads the updated state

The shape of `log_decay` selects the model: None (DeltaNet, arXiv 2406.06484), [H] or [B T H] (the gated delta rule,
arXiv 2412.06464). A key's direction shrinks by 1 - b |k|^2, so b |k|^2 from 0 to 2 keeps the state bounded;
above that it grows with every token, in every paradigm. Keys of norm 1 are the caller's: `unit_norm` makes them.

The general family has S_t = (diag(exp(a_t)) + x_t y_t^T) S_{t-1} + k_t v_t^T, a diagonal and any rank-one matrix
(RWKV-7); it is not built here.

There is no parallel paradigm: the weight that token i gives token j depends on every key between the two, so the T x T
matrix of weights is the inverse of a triangular one, and costs T^3. The chunkwise paradigm is that, chunk by chunk.

As in decay.py, a log-decay of -inf is legal and resets the state, and log-decays are added up stretch by stretch.
"""

from functools import partial
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ...registry import SeqmixError
from ..autograd import needs_grad, refuse_tangents
from ..context_parallel import Context
from ..decay.api import TOLERANCES
from ..kernels import Kernel, declare, require_floats
from ..packing import require_borders
from ..paradigm import Paradigm
from .chunkwise import chunkwise_op
from .recurrent import one_step, recurrent_op

LogDecay: TypeAlias = Float[Tensor, " H"] | Float[Tensor, "B T H"] | None
"""Natural logarithm of the decay, <= 0: fixed a head, or given for every token and head."""


class DeltaOutput(NamedTuple):
    """What a delta map returns."""

    output: Float[Tensor, "B T H V"]
    """In the dtype of the queries."""
    final_state: Float[Tensor, "N H K V"] | None
    """float32 (float64 for float64 inputs); None unless wanted."""


def delta(
    paradigm: Paradigm,
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: LogDecay,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
    chunk_size: int = 64,
    context: Context | None = None,
) -> DeltaOutput:
    """The map in any paradigm; arguments and result are those of `delta_chunkwise`.

    With a context, tokens are this rank's, borders and states those of the whole row. The map is then computed twice:
    from the identity beside no state, for what the segment does with a state and writes, and from the state that the
    segments before it leave.

    Raises:
        SeqmixError: there is no such paradigm, or as the paradigm's own function.
    """
    functions = {Paradigm.RECURRENT: delta_recurrent, Paradigm.CHUNKWISE: delta_chunkwise}
    if paradigm not in functions:
        raise SeqmixError(f"the delta rule has no {paradigm} paradigm; it has {', '.join(functions)}")
    chunks = {"chunk_size": chunk_size} if paradigm is Paradigm.CHUNKWISE else {}
    compute = partial(functions[paradigm], k=k, beta=beta, log_decay=log_decay, scale=scale, **chunks)
    if context is None:
        return compute(
            q, v=v, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
        )
    length, borders = q.shape[1], context.borders(cu_seqlens, q.shape[1])
    # the map is linear in (state, values): columns of the identity, from which nothing is written, become those of M
    rows, (heads, width) = len(q) if borders is None else len(borders) - 1, k.shape[2:]
    wide = torch.promote_types(q.dtype, torch.float32)
    identity = torch.eye(width, dtype=wide, device=q.device).expand(rows, heads, width, width)
    _, both = compute(
        k.detach(),
        v=F.pad(v, (0, width)),
        initial_state=F.pad(identity, (v.shape[3], 0)),
        output_final_state=True,
        cu_seqlens=borders,
    )
    written, transition = context.last_row(both, cu_seqlens, length).split([v.shape[3], width], dim=-1)
    state = context.entry(transition, written, initial_state, cu_seqlens, length, torch.matmul)
    output, final_state = compute(
        q, v=v, initial_state=state, output_final_state=output_final_state, cu_seqlens=borders
    )
    return DeltaOutput(output, None if final_state is None else context.final(final_state, cu_seqlens, length))


def delta_recurrent(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: LogDecay,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
) -> DeltaOutput:
    """Token by token, by the definition. One token costs the same at every position: decoding.

    Arguments and result are those of `delta_chunkwise`.
    """
    scale = _check(q, k, v, beta, log_decay, scale, initial_state, cu_seqlens)
    if q.shape[1] > 1 or cu_seqlens is not None:
        needs_grad = _needs_grad_backward(q, k, v, beta, log_decay, initial_state)
        output, final_state, _ = recurrent_op(q, k, v, beta, log_decay, initial_state, cu_seqlens, scale, needs_grad)
        return DeltaOutput(output, final_state if output_final_state else None)
    # plain operations, which a compiler fuses with what surrounds them
    output, state = one_step(q, k, v, beta, log_decay, scale, initial_state)
    return DeltaOutput(output, state if output_final_state else None)


def delta_chunkwise(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: LogDecay,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
    chunk_size: int = 64,
) -> DeltaOutput:
    """Parallel inside chunks, recurrent between them. Linear in T, in time and memory, forward and backward.

    Args:
        q: queries.
        k: keys; of norm 1 where beta is up to 2.
        v: values.
        beta: how much of the prediction's error is written, from 0 to 2 for keys of norm 1.
        log_decay: natural log of the decay, <= 0, -inf allowed; None means no decay.
        scale: factor of the output, 1/sqrt(K) by default.
        initial_state: state before the first token; it decays before the first token is predicted. None means zero.
        output_final_state: whether the state after the last token is wanted.
        cu_seqlens: borders of N documents packed into one row (B = 1); states then have N rows.
        chunk_size: tokens a chunk; changes the cost, never the result.

    Raises:
        SeqmixError: shapes or dtypes do not fit, said in one sentence.
    """
    scale = _check(q, k, v, beta, log_decay, scale, initial_state, cu_seqlens)
    if chunk_size < 1:
        raise SeqmixError(f"chunk_size must be at least 1, and is {chunk_size}")
    output, final_state, _ = chunkwise_op(
        q,
        k,
        v,
        beta,
        log_decay,
        initial_state,
        cu_seqlens,
        scale,
        chunk_size,
        output_final_state,
        _needs_grad_backward(q, k, v, beta, log_decay, initial_state),
    )
    return DeltaOutput(output, final_state if output_final_state else None)


def unit_norm(x: Float[Tensor, "*batch K"], eps: float = 1e-6) -> Float[Tensor, "*batch K"]:
    """x / sqrt(|x|^2 + eps) over the last dimension: norm 1, and zeros stay zeros. In x's dtype, summed in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def _needs_grad_backward(*tensors: Tensor | None) -> bool:
    """Whether a custom op keeps states for a backward pass.

    Raises:
        SeqmixError: an input has a tangent.
    """
    refuse_tangents("the delta rule, beyond one token,", *tensors)
    return needs_grad(*tensors)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> float:
    """Refuse shapes and dtypes that do not fit; return the scale."""
    require_floats(q, k, v)
    if q.ndim != 4 or q.shape != k.shape or v.shape[:3] != q.shape[:3] or q.shape[1] < 1:
        raise SeqmixError(
            "q and k must be [B T H K] and v [B T H V] with T >= 1; "
            f"given are {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    batch, length, heads, key_width = q.shape
    if tuple(beta.shape) != (batch, length, heads) or not beta.is_floating_point():
        raise SeqmixError(
            f"beta must be floats [B T H] with B, T, H = {batch}, {length}, {heads}; "
            f"given is {list(beta.shape)} of {str(beta.dtype).removeprefix('torch.')}"
        )
    if log_decay is not None and tuple(log_decay.shape) not in ((heads,), (batch, length, heads)):
        raise SeqmixError(
            f"log_decay must be None, [H] or [B T H] with B, T, H = {batch}, {length}, {heads}; "
            f"given is {list(log_decay.shape)}"
        )
    if cu_seqlens is not None and batch != 1:
        raise SeqmixError(f"packed documents are one row (B = 1), and the batch is {batch}")
    if cu_seqlens is not None:
        require_borders(cu_seqlens, length)
    state = (batch if cu_seqlens is None else len(cu_seqlens) - 1, heads, key_width, v.shape[3])
    if initial_state is not None and tuple(initial_state.shape) != state:
        raise SeqmixError(f"the initial state must be {list(state)}, and is {list(initial_state.shape)}")
    return key_width**-0.5 if scale is None else scale


def delta_flops(
    paradigm: Paradigm, length: int, key_width: int, value_width: int, *, chunk_size: int = 64, context: int = 0
) -> int:
    """Operations of one head's matrix products, forward, as each paradigm computes them (masked squares in full).

    The chunks' triangular solves, a third of C^3 multiplications each, are no products and not counted.

    Args:
        paradigm: how it is computed, recurrent or chunkwise.
        length: tokens of the segment.
        key_width: K.
        value_width: V.
        chunk_size: tokens a chunk.
        context: tokens read before; any adds the products with the initial state.

    Raises:
        SeqmixError: there is no such paradigm.
    """
    per_state = 2 * key_width * value_width
    if paradigm is Paradigm.RECURRENT:
        # prediction, write and query; the first token of all has nothing to predict from
        return (3 * length - (not context)) * per_state
    if paradigm is not Paradigm.CHUNKWISE:
        raise SeqmixError(f"the delta rule has no {paradigm} paradigm; it has recurrent, chunkwise")
    whole, ragged = divmod(length, chunk_size)
    # queries and keys each meet the keys; T and the queries' weights each meet the values
    inside = (whole * chunk_size**2 + ragged**2) * 4 * (key_width + value_width)
    # every chunk but the first reads a state twice, every chunk but the last writes one
    last = ragged or chunk_size
    read = length if context else length - min(length, chunk_size)
    return inside + (2 * read + length - last) * per_state


# Twice the worst of several thousand cases a function, or what exp makes of large exponents, as in decay.py. In float32
# chunks lose most where every key is the same and beta is 2: each transition is a reflection, and nothing dies away.
declare(
    Kernel(
        op="delta",
        paradigm=Paradigm.RECURRENT,
        backend="reference",
        function=delta_recurrent,
        tolerances=TOLERANCES,
        reference=True,
    )
)
declare(
    Kernel(
        op="delta",
        paradigm=Paradigm.CHUNKWISE,
        backend="reference",
        function=delta_chunkwise,
        tolerances=TOLERANCES | {torch.float32: 2e-5},
        reference=True,
    )
)
