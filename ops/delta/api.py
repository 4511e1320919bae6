"""The delta family: a matrix state in which a key's value is replaced, not added to (the delta rule).

Notation: B batch, T tokens, H heads, K key width, V value width, C chunk, N packed documents; g = log_decay, b = beta.

    S_t = (I - b_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + b_t k_t v_t^T         state  [H K V]
        = P_t + b_t k_t (v_t - k_t^T P_t),  P_t = diag(exp(g_t)) S_{t-1}    the prediction is that of the decayed state
    o_t = scale * q_t S_t                                                   the query reads the updated state

The shape of `log_decay` selects the model: None (DeltaNet, arXiv 2406.06484), [H] or [B T H] (the gated delta rule,
arXiv 2412.06464), [B T H K] (Kimi Delta Attention, arXiv 2510.26692). A key's direction shrinks by 1 - b |k|^2, so
b |k|^2 from 0 to 2 keeps the state bounded; above that it grows with every token, in every paradigm. Keys of norm 1 are
the caller's: `unit_norm` makes them. Several such steps per token are `delta_product`; what is read and what is written
may differ in ops/dplr, which the same kernels compute.

There is no parallel paradigm: the weight that token i gives token j depends on every key between the two, so the T x T
matrix of weights is the inverse of a triangular one, and costs T^3. The chunkwise paradigm is that, chunk by chunk.

As in decay.py, a log-decay of -inf is legal and resets the state, and log-decays are added up stretch by stretch.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...registry import SeqmixError
from ..decay.api import TOLERANCES, LogDecay
from ..recurrence.family import Family, Recurrence, RecurrenceOutput, Run, recur
from ..recurrence.intra_chunk import pairs_by_halves
from ..runtime.call import Call, CallOptions
from ..runtime.kernel import declare_references
from ..runtime.paradigm import Paradigm
from .chunkwise import delta_chunkwise
from .recurrent import delta_recurrent

CHUNK_SIZE = 64
"""Default chunk length in tokens: its triangular solve is cubic in it, so it is half the decay family's."""


def delta(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: LogDecay = None,
    call: Call | None = None,
    *,
    scale: float | None = None,
    **options: Unpack[CallOptions],
) -> RecurrenceOutput:
    """The delta rule: with P_t the decayed state, S_t = P_t + beta_t k_t (v_t - k_t^T P_t)^T, o_t = scale q_t S_t.

    Chunkwise (the default, in chunks of 64 tokens) it is linear in T, in time and memory, forward and backward;
    recurrent, one token costs the same at every position. There is no parallel paradigm. The state is [N H K V].

    Args:
        q: queries.
        k: keys; of norm 1 where beta is up to 2.
        v: values.
        beta: how much of the prediction's error is written, from 0 to 2 for keys of norm 1.
        log_decay: natural log of the decay, <= 0, -inf allowed; None means no decay.
        call: the call of a mixer; None for those who call the op by itself, with `options`.
        scale: factor of the output, 1/sqrt(K) by default.
        options: `CallOptions`; the initial state decays before the first token is predicted.

    Raises:
        SeqmixError: shapes or dtypes do not fit, or the paradigm does not exist.
    """
    call = Call.given(call, q.shape[1], options, paradigm=Paradigm.CHUNKWISE, chunk_size=CHUNK_SIZE)
    require_paradigm(call.paradigm)
    return recur(DELTA, q, k, v, call, beta=beta, log_decay=log_decay, scale=scale)


def delta_product(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T*n H K"],
    v: Float[Tensor, "B T*n H V"],
    beta: Float[Tensor, "B T*n H"],
    log_decay: LogDecay = None,
    call: Call | None = None,
    *,
    scale: float | None = None,
    **options: Unpack[CallOptions],
) -> RecurrenceOutput:
    """n steps of the delta rule per token, from one decay before the first to one query after the last (DeltaProduct,
    arXiv 2502.10297): a transition of n Householder matrices.

    q and log_decay have one entry per token; the steps of a token are neighbours in k, v and beta. They are tokens of
    `delta`, so chunks count steps.

    Args:
        q: queries.
        k: keys, n per token.
        v: values, n per token.
        beta: how much of each prediction's error is written.
        log_decay: natural log of the decay before a token's first step; None means no decay.
        call: as of `delta`.
        scale: as of `delta`.
        options: as of `delta`.

    Raises:
        SeqmixError: shapes or dtypes do not fit, or the paradigm does not exist.
    """
    call = Call.given(call, q.shape[1], options, paradigm=Paradigm.CHUNKWISE, chunk_size=CHUNK_SIZE)
    batch, length, heads = q.shape[:3]
    steps = k.shape[1] // length
    if steps < 1 or k.shape[1] != steps * length:
        raise SeqmixError(f"k must have a whole number of steps per token of q; given are {k.shape[1]} for {length}")
    if steps > 1:
        q = F.pad(q[:, :, None], (0, 0, 0, 0, steps - 1, 0)).flatten(1, 2)
        if log_decay is not None:
            a = log_decay.expand(batch, length, heads) if log_decay.ndim == 1 else log_decay
            log_decay = F.pad(a[:, :, None], (0, 0) * (a.ndim - 2) + (0, steps - 1)).flatten(1, 2)
        call = call._replace(documents=None if call.documents is None else call.documents.repeated(steps))
    output, state = delta(q, k, v, beta, log_decay, call, scale=k.shape[3] ** -0.5 if scale is None else scale)
    return RecurrenceOutput(output[:, steps - 1 :: steps], state)


def segment(x: Recurrence, kernel: Run, call: Call) -> tuple[Tensor, Tensor]:
    """What a segment multiplies a state with, [B H K K], and what it writes: of the document it leaves unfinished.

    The map is linear in (state, values): columns of the identity, from which nothing is written, become those of M.
    """
    assert call.cp_group is not None
    (heads, key_width, value_width), rows = x.matrix, x.rows
    identity = torch.eye(key_width, dtype=x.wide, device=x.q.device).expand(rows, heads, key_width, key_width)
    x = x._replace(
        q=x.k.detach(),
        v=F.pad(x.v, (0, key_width)),
        initial_state=F.pad(identity, (value_width, 0)),
        output_final_state=True,
    )
    _, both = kernel(x)
    assert both is not None
    written, transition = call.cp_group.last_row(both, call.documents).split([value_width, key_width], dim=-1)
    return transition, written


def unit_norm(x: Float[Tensor, "*batch K"], eps: float = 1e-6) -> Float[Tensor, "*batch K"]:
    """x / sqrt(|x|^2 + eps) over the last dimension: norm 1, and zeros stay zeros. In x's dtype, summed in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


PARADIGMS = frozenset({Paradigm.RECURRENT, Paradigm.CHUNKWISE})


def require_paradigm(paradigm: Paradigm) -> None:
    """Refuse the parallel paradigm."""
    if paradigm not in PARADIGMS:
        raise SeqmixError(f"the delta rule has no {paradigm} paradigm; it has {', '.join(sorted(PARADIGMS))}")


def delta_flops(
    paradigm: Paradigm,
    length: int,
    key_width: int,
    value_width: int,
    *,
    chunk_size: int = CHUNK_SIZE,
    context: int = 0,
    key_decays: bool = False,
    n_keys: int = 1,
    steps: int = 1,
) -> int:
    """Operations of one head's matrix products, forward, as each paradigm computes them (masked squares in full).

    The chunks' triangular solves, a third of C^3 multiplications each, are not products and are not counted.

    Args:
        paradigm: how it is computed, recurrent or chunkwise.
        length: tokens of the segment.
        key_width: K.
        value_width: V.
        chunk_size: chunk length in tokens.
        context: tokens read before; any adds the products with the initial state.
        key_decays: whether log_decay is [B T H K], whose chunks form products of queries and keys by halves.
        n_keys: keys that a token writes with: two in ops/dplr, where b is given.
        steps: steps per token, of `delta_product`; of their writes, which are no matrix products, one is counted.

    Raises:
        SeqmixError: the paradigm does not exist.
    """
    per_state = 2 * key_width * value_width
    if paradigm is Paradigm.RECURRENT:
        # predictions, writes and queries; the first token of all has nothing to predict from
        return ((2 * steps + n_keys) * length - (n_keys if not context else 0)) * per_state
    require_paradigm(paradigm)
    length *= steps
    whole, ragged = divmod(length, chunk_size)
    squares = whole * chunk_size**2 + ragged**2
    pairs = whole * pairs_by_halves(chunk_size) + pairs_by_halves(ragged) if key_decays else squares
    # queries and what predicts each meet the keys; T, the queries' weights and those of given values meet the values
    inside = 4 * n_keys * pairs * key_width + 4 * n_keys * squares * value_width
    # every chunk but the first reads a state twice, every chunk but the last writes one
    last = ragged or chunk_size
    read = length if context else length - min(length, chunk_size)
    return inside + (2 * read + n_keys * (length - last)) * per_state


# Twice the worst of several thousand cases per function, or what exp makes of large exponents, as in decay/api.py. In
# float32 chunks lose most where every key is the same and beta is 2: each transition is a reflection, and nothing
# dies away.
CHUNKWISE_TOLERANCES = TOLERANCES | {torch.float32: 2e-5}

declare_references(
    "delta",
    {Paradigm.RECURRENT: (delta_recurrent, TOLERANCES), Paradigm.CHUNKWISE: (delta_chunkwise, CHUNKWISE_TOLERANCES)},
)

DELTA = Family("delta", PARADIGMS, delta_flops, segment, torch.matmul)
"""What mixers know of the family."""
