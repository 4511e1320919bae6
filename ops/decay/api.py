"""The decay family: a matrix state that decays, to which each token adds an outer product.

Notation: B batch, T tokens, H heads, G groups of heads, K key width, V value width, C chunk, N packed documents;
a = log_decay.

    S_t = diag(exp(a_t)) S_{t-1} + k_t v_t^T            state  [H K V]
    o_t = scale * q_t S_t                                the query reads the updated state

The shape of `log_decay` selects the model: None (linear attention), [H] (retention, Lightning), [B T H] (gated
retention, Mamba-2), [B T H K] (GLA, HGRN2). With gamma = exp(a), the parallel paradigm is Eq. 5 of the RetNet paper
(arXiv 2307.08621), the recurrent one Eq. 6, and the chunkwise one Eq. 7. The caller applies rotations to q and k.

A log-decay of -inf is allowed and resets the state. The sum of log-decays over several tokens is therefore always
computed by adding up these tokens, never as the difference of two running sums, which would be inf - inf.
"""

from typing import Literal, TypeAlias, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from ..recurrence.family import Family, Recurrence, RecurrenceOutput, Run, recur, require_decay
from ..recurrence.intra_chunk import count_product_pairs
from ..runtime.call import CHUNK_SIZE, Call, CallOptions
from ..runtime.kernel import declare_references
from ..runtime.packing import Documents
from ..runtime.paradigm import Paradigm
from .chunkwise import decay_chunkwise
from .parallel import decay_parallel, per_token
from .recurrent import decay_recurrent

LogDecay: TypeAlias = Float[Tensor, " H"] | Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None
"""Natural logarithm of the decay, <= 0: one per head, or one per token and head (and key dimension)."""

Backend = Literal["auto", "reference", "native", "triton", "triton_tf32x3", "fla"]
"""Kernel backend. `auto` is resolved when a model is built; `reference` uses plain torch, `native` C++ on a CPU,
`triton` the kernels of this library, `triton_tf32x3` the same kernels with each float32 product computed as three TF32
products."""


def decay(
    q: Float[Tensor, "B T G K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T H V"],
    log_decay: LogDecay = None,
    call: Call | None = None,
    *,
    scale: float | None = None,
    wide_output: bool = False,
    **options: Unpack[CallOptions],
) -> RecurrenceOutput:
    """Recurrence with a decaying matrix state: S_t = diag(exp(a_t)) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t.

    The chunkwise paradigm (the default) takes time and memory linear in T, forward and backward. The parallel paradigm
    is quadratic in T. In the recurrent paradigm a token costs the same at every position. The state is [N H K V].

    Args:
        q: queries; each is shared by H / G heads.
        k: keys; each is shared by H / G heads.
        v: values.
        log_decay: natural log of the decay, <= 0, -inf allowed; None means no decay. Positive values are refused in a
            direct call on a CPU. On other devices and in compiled code, where reading them would wait for the device,
            the state grows until it overflows.
        call: the call of a mixer; None if you call the op directly, with `options`.
        scale: factor of the output, 1/sqrt(K) by default.
        wide_output: True to return the output of 16-bit inputs in float32.
        options: keywords of a direct call, see `CallOptions`; the initial state decays before the first token is added.

    Raises:
        SeqmixError: if shapes or dtypes do not fit, or an option is invalid.
    """
    if call is None:
        require_decay(log_decay)
    call = Call.resolve(call, q.shape[1], options, op="decay", paradigm=Paradigm.CHUNKWISE)
    return recur(DECAY, q, k, v, call, log_decay=log_decay, scale=scale, wide_output=wide_output)


def decay_reading_values(
    q: Float[Tensor, "B T H V"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H K"],
    call: Call | None = None,
    *,
    scale: float | None = None,
    **options: Unpack[CallOptions],
) -> RecurrenceOutput:
    """Decay recurrence whose queries read the state along its values: o_t = scale S_t q_t, [B T H K].

    The update of the state [N H K V] is that of `decay`. Other paradigms than the chunkwise one compute each key
    dimension as a head with values of width 1. Backends other than `reference` and `native` run the reference.

    Args:
        q: queries.
        k: keys.
        v: values.
        log_decay: natural log of the decay per key dimension, <= 0, -inf allowed.
        call: the call of a mixer; None if you call the op directly, with `options`.
        scale: factor of the output, 1/sqrt(V) by default.
        options: keywords of a direct call, see `CallOptions`.

    Raises:
        SeqmixError: if shapes or dtypes do not fit, or an option is invalid.
    """
    if call is None:
        require_decay(log_decay)
    call = Call.resolve(call, q.shape[1], options, op="decay", paradigm=Paradigm.CHUNKWISE)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if call.paradigm is Paradigm.CHUNKWISE:
        return recur(DECAY, q, k, v, call, log_decay=log_decay, scale=scale, reads_values=True)
    # the kernels of other backends want wider values
    backend = call.backend if call.backend in ("reference", "native") else "reference"
    state = None if call.state is None else call.state.flatten(1, 2)[..., None]
    call = call._replace(state=state, backend=backend)
    output, state = recur(DECAY, q, v, k.flatten(2)[..., None], call, log_decay=log_decay.flatten(2), scale=scale)
    return RecurrenceOutput(output.view_as(k), None if state is None else state.view(-1, *k.shape[2:], v.shape[-1]))


def _segment_map(x: Recurrence, kernel: Run, call: Call) -> tuple[Tensor, Tensor]:
    """Return the map S -> M S + U of a segment: its decay M, [1|B H 1|K 1], and the state U that it writes.

    For packed documents, both are those of the document of the segment's last token.
    """
    assert call.cp_group is not None
    q = (x.v if x.reads_values else x.k).detach()
    _, written = kernel(x._replace(q=q, initial_state=None, output_final_state=True))
    assert written is not None
    decay = _segment_decay(x, call.documents).to(written.dtype)
    return decay, call.cp_group.last_row(written, call.documents)


def _segment_decay(x: Recurrence, documents: Documents | None) -> Tensor:
    """Return the product of the decays of all tokens (if packed, of the last document's tokens), [1|B H 1|K 1]."""
    if x.log_decay is None:
        return x.k.new_ones(1, x.state_shape[0], 1, 1)
    a = per_token(x.log_decay.to(torch.promote_types(x.log_decay.dtype, torch.float32)), x.k.shape[1])
    if documents is not None:
        in_last_document = documents.of_token == documents.of_token[-1]
        a = torch.where(in_last_document[:, None], a, 0)
    return a.sum(2)[..., None].exp()


def decay_flops(
    paradigm: Paradigm,
    length: int,
    key_width: int,
    value_width: int,
    *,
    chunk_size: int = CHUNK_SIZE,
    context: int = 0,
    key_decays: bool = False,
) -> int:
    """Count the operations (FLOPs) of one head's matrix products in a forward pass.

    Causal scores count as full squares, because kernels also compute the masked half.

    Args:
        paradigm: parallel, recurrent or chunkwise.
        length: tokens of the segment.
        key_width: K.
        value_width: V.
        chunk_size: chunk length in tokens.
        context: tokens before the segment; if there are any, the product with the initial state is counted.
        key_decays: True if log_decay is [B T H K]; scores are then computed in blocks, see recurrence/intra_chunk.py.
    """
    per_pair = 2 * (key_width + value_width)
    per_state = 2 * key_width * value_width
    if paradigm is Paradigm.RECURRENT:
        return 2 * length * per_state
    if paradigm is Paradigm.PARALLEL:
        return length * length * per_pair + (length * per_state if context else 0)
    whole, ragged = divmod(length, chunk_size)
    squares = whole * chunk_size**2 + ragged**2
    pairs = whole * count_product_pairs(chunk_size) + count_product_pairs(ragged) if key_decays else squares
    inside = 2 * (pairs * key_width + squares * value_width)
    # every chunk but the first reads a state, every chunk but the last writes one
    last = ragged or chunk_size
    read = length if context else length - min(length, chunk_size)
    return inside + (read + length - last) * per_state


# Twice the largest error in several thousand cases per function, or, if that is larger, the error of exp: the rounding
# of an exponent of up to 87 in float32 and 708 in float64, beyond which exp underflows. The parallel paradigm rounds
# its scores to 16 bits.
TOLERANCES = {torch.float64: 2e-13, torch.float32: 1e-5, torch.bfloat16: 7e-3, torch.float16: 9e-4}

declare_references(
    "decay",
    {
        Paradigm.PARALLEL: (decay_parallel, TOLERANCES | {torch.bfloat16: 1.5e-2, torch.float16: 1.8e-3}),
        Paradigm.RECURRENT: (decay_recurrent, TOLERANCES),
        Paradigm.CHUNKWISE: (decay_chunkwise, TOLERANCES),
    },
)

DECAY = Family("decay", frozenset(Paradigm), decay_flops, _segment_map, torch.mul)
"""The decay family, as mixers use it."""
