"""The decay family: a matrix state that decays and is written by outer products.

Notation: B batch, T tokens, H heads, G groups of heads, K key width, V value width, C chunk, N packed documents;
a = log_decay.

    S_t = diag(exp(a_t)) S_{t-1} + k_t v_t^T            state  [H K V]
    o_t = scale * q_t S_t                                the query reads the updated state

The shape of `log_decay` selects the model: None (linear attention), [H] (retention, Lightning), [B T H] (gated
retention, Mamba-2), [B T H K] (GLA, HGRN2). With gamma = exp(a), the parallel paradigm is Eq. 5 of the RetNet paper
(arXiv 2307.08621), the recurrent one its Eq. 6, the chunkwise one its Eq. 7; rotations are the caller's.

A log-decay of -inf is legal and resets the state: sums of log-decays over a stretch are always formed by adding up that
stretch, never as the difference of two running sums, which would be inf - inf.
"""

from typing import Literal, TypeAlias, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from ..recurrence.family import Family, Recurrence, RecurrenceOutput, Run, recur
from ..recurrence.intra_chunk import pairs_by_halves
from ..runtime.call import CHUNK_SIZE, Call, CallOptions
from ..runtime.kernel import declare_references
from ..runtime.packing import Documents
from ..runtime.paradigm import Paradigm
from .chunkwise import decay_chunkwise
from .parallel import decay_parallel, per_token
from .recurrent import decay_recurrent

LogDecay: TypeAlias = Float[Tensor, " H"] | Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None
"""Natural logarithm of the decay, <= 0: fixed per head, or given for every token and head (and key dimension)."""

Backend = Literal["auto", "reference", "triton", "triton_tf32x3", "fla"]
"""The kernel backend: `auto` is resolved when a model is built; `reference` is torch's own, `triton` this library's,
`triton_tf32x3` that with each product of float32 as three of TF32."""


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

    Chunkwise (the default) it is linear in T, in time and memory, forward and backward; parallel it is quadratic;
    recurrent, one token costs the same at every position. The state is [N H K V].

    Args:
        q: queries; the H / G heads of a group share them.
        k: keys; as queries.
        v: values.
        log_decay: natural log of the decay, <= 0, -inf allowed; None means no decay.
        call: the call of a mixer; None for those who call the op by itself, with `options`.
        scale: factor of the output, 1/sqrt(K) by default.
        wide_output: True if the output of 16-bit inputs is to be float32.
        options: `CallOptions`; the initial state decays before the first token is added.

    Raises:
        SeqmixError: shapes or dtypes do not fit, or the paradigm does not exist.
    """
    call = Call.given(call, q.shape[1], options, paradigm=Paradigm.CHUNKWISE)
    return recur(DECAY, q, k, v, call, log_decay=log_decay, scale=scale, wide_output=wide_output)


def _segment(x: Recurrence, kernel: Run, call: Call) -> tuple[Tensor, Tensor]:
    """A segment's decay of a state, [1|B H 1|K 1], and what it writes: of the document it leaves unfinished."""
    assert call.cp_group is not None
    _, written = kernel(x._replace(q=x.k.detach(), initial_state=None, output_final_state=True))
    assert written is not None
    decayed = _decay_of(x, call.documents).to(written.dtype)
    return decayed, call.cp_group.last_row(written, call.documents)


def _decay_of(x: Recurrence, documents: Documents | None) -> Tensor:
    """The decays of the tokens (of the last document's), multiplied: [1|B H 1|K 1]."""
    if x.log_decay is None:
        return x.k.new_ones(1, x.matrix[0], 1, 1)
    a = per_token(x.log_decay.to(torch.promote_types(x.log_decay.dtype, torch.float32)), x.k.shape[1])
    if documents is not None:
        counted = documents.of_token == documents.of_token[-1]
        a = torch.where(counted[:, None], a, 0)
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
    """Operations of one head's matrix products, forward, as each paradigm computes them (masked squares in full).

    Args:
        paradigm: how it is computed.
        length: tokens of the segment.
        key_width: K.
        value_width: V.
        chunk_size: chunk length in tokens.
        context: tokens read before; any adds the product with the initial state.
        key_decays: whether log_decay is [B T H K], whose chunks form products of queries and keys by halves.
    """
    per_pair = 2 * (key_width + value_width)
    per_state = 2 * key_width * value_width
    if paradigm is Paradigm.RECURRENT:
        return 2 * length * per_state
    if paradigm is Paradigm.PARALLEL:
        return length * length * per_pair + (length * per_state if context else 0)
    whole, ragged = divmod(length, chunk_size)
    squares = whole * chunk_size**2 + ragged**2
    pairs = whole * pairs_by_halves(chunk_size) + pairs_by_halves(ragged) if key_decays else squares
    inside = 2 * (pairs * key_width + squares * value_width)
    # every chunk but the first reads a state, every chunk but the last writes one
    last = ragged or chunk_size
    read = length if context else length - min(length, chunk_size)
    return inside + (read + length - last) * per_state


# Twice the worst of several thousand cases per function, or, if larger, what exp makes of exponents that do not
# underflow: an error of 87 roundings in float32, of 708 in float64. The parallel form rounds its scores to 16 bits.
TOLERANCES = {torch.float64: 2e-13, torch.float32: 1e-5, torch.bfloat16: 7e-3, torch.float16: 9e-4}

declare_references(
    "decay",
    {
        Paradigm.PARALLEL: (decay_parallel, TOLERANCES | {torch.bfloat16: 1.5e-2, torch.float16: 1.8e-3}),
        Paradigm.RECURRENT: (decay_recurrent, TOLERANCES),
        Paradigm.CHUNKWISE: (decay_chunkwise, TOLERANCES),
    },
)

DECAY = Family("decay", frozenset(Paradigm), decay_flops, _segment, torch.mul)
"""What mixers know of the family."""
