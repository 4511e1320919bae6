"""The delta family: a matrix state in which a token replaces the value of its key instead of adding to it (delta rule).

Notation: B batch, T tokens, H heads, K key width, V value width, C chunk, N packed documents; g = log_decay, b = beta.

    S_t = (I - b_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + b_t k_t v_t^T         state  [H K V]
        = P_t + b_t k_t (v_t - k_t^T P_t),  P_t = diag(exp(g_t)) S_{t-1}    the decayed state predicts k_t^T P_t
    o_t = scale * q_t S_t                                                   the query reads the updated state

The shape of `log_decay` selects the model: None (DeltaNet, arXiv 2406.06484), [H] or [B T H] (the gated delta rule,
arXiv 2412.06464), [B T H K] (Kimi Delta Attention, arXiv 2510.26692). The state is multiplied by 1 - b |k|^2 in the
direction of the key, so b |k|^2 from 0 to 2 keeps it bounded; above 2 it grows with every token, in every paradigm. The
caller normalizes the keys, for example with `unit_norm`. `delta_product` takes several such steps per token. In
ops/dplr, which uses the same kernels, a token may read and write with different keys.

There is no parallel paradigm: the weight that token i gives token j depends on every key between them, so the T x T
matrix of weights is the inverse of a triangular matrix and costs T^3. The chunkwise paradigm inverts it per chunk.

As in the decay family, a log-decay of -inf is allowed and resets the state, and no sum of log-decays is computed as a
difference.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...registry import SeqmixError
from ..decay.api import TOLERANCES, LogDecay
from ..recurrence.family import Family, Recurrence, RecurrenceOutput, Run, recur, require_decay
from ..recurrence.intra_chunk import count_product_pairs
from ..runtime.call import Call, CallOptions
from ..runtime.kernel import declare_references
from ..runtime.paradigm import Paradigm
from .chunkwise import delta_chunkwise
from .recurrent import delta_recurrent

CHUNK_SIZE = 64
"""Default chunk length in tokens: half that of the decay family, because the triangular solve is cubic in it."""


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

    The chunkwise paradigm (the default, with chunks of 64 tokens) takes time and memory linear in T, forward and
    backward. In the recurrent paradigm a token costs the same at every position. There is no parallel paradigm. The
    state is [N H K V].

    Args:
        q: queries.
        k: keys, normally of norm 1 (`unit_norm`).
        v: values.
        beta: factor of the prediction error that is written, from 0 to 2 for keys of norm 1.
        log_decay: natural log of the decay, <= 0, -inf allowed; None means no decay.
        call: the call of a mixer; None if you call the op directly, with `options`.
        scale: factor of the output, 1/sqrt(K) by default.
        options: keywords of a direct call, see `CallOptions`; the initial state decays before the first prediction.

    Raises:
        SeqmixError: if shapes or dtypes do not fit, or an option is invalid.
    """
    if call is None:
        require_decay(log_decay)
    call = Call.resolve(call, q.shape[1], options, op="delta", paradigm=Paradigm.CHUNKWISE, chunk_size=CHUNK_SIZE)
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
    """The delta rule with n steps per token; a transition has n Householder factors (DeltaProduct, arXiv 2502.10297).

    Each token decays the state before its first step, and its query reads the state after its last step. q and
    log_decay have one entry per token; in k, v and beta the steps of a token are adjacent. The steps run as tokens of
    `delta`, so `chunk_size` counts steps.

    Args:
        q: queries, one per token.
        k: keys, n per token.
        v: values, n per token.
        beta: factor of the prediction error that each step writes.
        log_decay: natural log of the decay before a token's first step; None means no decay.
        call: the call of a mixer, as for `delta`.
        scale: factor of the output, as for `delta`.
        options: keywords of a direct call, as for `delta`.

    Raises:
        SeqmixError: if shapes or dtypes do not fit, or an option is invalid.
    """
    if call is None:
        require_decay(log_decay)
    call = Call.resolve(call, q.shape[1], options, op="delta", paradigm=Paradigm.CHUNKWISE, chunk_size=CHUNK_SIZE)
    batch, length, heads = q.shape[:3]
    steps = k.shape[1] // length
    if steps < 1 or k.shape[1] != steps * length:
        raise SeqmixError(
            f"expected k to have a whole number of steps per token of q, got {k.shape[1]} keys for {length} tokens"
        )
    if steps > 1:
        q = F.pad(q[:, :, None], (0, 0, 0, 0, steps - 1, 0)).flatten(1, 2)
        if log_decay is not None:
            a = log_decay.expand(batch, length, heads) if log_decay.ndim == 1 else log_decay
            log_decay = F.pad(a[:, :, None], (0, 0) * (a.ndim - 2) + (0, steps - 1)).flatten(1, 2)
        call = call._replace(documents=None if call.documents is None else call.documents.repeated(steps))
    output, state = delta(q, k, v, beta, log_decay, call, scale=k.shape[3] ** -0.5 if scale is None else scale)
    return RecurrenceOutput(output[:, steps - 1 :: steps], state)


def segment_map(x: Recurrence, kernel: Run, call: Call) -> tuple[Tensor, Tensor]:
    """Return the map S -> M S + U of a segment: M, [B H K K], and the state U that it writes.

    For packed documents, both are those of the document of the segment's last token. The recurrence is linear in the
    pair (state, values): started from the columns of the identity, with zero values, it ends in the columns of M.
    """
    assert call.cp_group is not None
    (heads, key_width, value_width), rows = x.state_shape, x.rows
    identity = torch.eye(key_width, dtype=x.wide_dtype, device=x.q.device).expand(rows, heads, key_width, key_width)
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
    """Normalize the last dimension, x / sqrt(|x|^2 + eps): norm 1, except that zeros stay zeros.

    The result has the dtype of x; the sum is computed in float32 (float64 for float64 inputs).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


PARADIGMS = frozenset({Paradigm.RECURRENT, Paradigm.CHUNKWISE})


def require_paradigm(paradigm: Paradigm) -> None:
    """Raise a SeqmixError for the parallel paradigm."""
    if paradigm not in PARADIGMS:
        raise SeqmixError(f"the delta rule has no {paradigm} paradigm: use one of {', '.join(sorted(PARADIGMS))}")


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
    """Count the operations (FLOPs) of one head's matrix products in a forward pass.

    Causal scores count as full squares, because kernels also compute the masked half. The triangular solves of the
    chunks, with C^3 / 3 multiplications each, are not matrix products and are not counted.

    Args:
        paradigm: recurrent or chunkwise.
        length: tokens of the segment.
        key_width: K.
        value_width: V.
        chunk_size: chunk length in tokens.
        context: tokens before the segment; if there are any, the products with the initial state are counted.
        key_decays: True if log_decay is [B T H K]; scores are then computed in blocks, see recurrence/intra_chunk.py.
        n_keys: number of keys that a token writes with: 2 in ops/dplr with b, else 1.
        steps: steps per token (`delta_product`). The recurrent paradigm counts only one write per token, because writes
            are not matrix products.

    Raises:
        SeqmixError: for the parallel paradigm.
    """
    per_state = 2 * key_width * value_width
    if paradigm is Paradigm.RECURRENT:
        # predictions, writes and queries; without a context, the first token has no state to predict from
        return ((2 * steps + n_keys) * length - (n_keys if not context else 0)) * per_state
    require_paradigm(paradigm)
    length *= steps
    whole, ragged = divmod(length, chunk_size)
    squares = whole * chunk_size**2 + ragged**2
    pairs = whole * count_product_pairs(chunk_size) + count_product_pairs(ragged) if key_decays else squares
    # scores of queries and read keys with the keys; products of the inverse and of the scores with the values
    inside = 4 * n_keys * pairs * key_width + 4 * n_keys * squares * value_width
    # every chunk but the first reads a state twice, every chunk but the last writes one
    last = ragged or chunk_size
    read = length if context else length - min(length, chunk_size)
    return inside + (2 * read + n_keys * (length - last)) * per_state


# Twice the largest error in several thousand cases per function, or the error of exp, as in decay/api.py. In float32,
# chunks lose most precision if all keys are equal and beta is 2: each transition is then a reflection, and errors do
# not decay.
CHUNKWISE_TOLERANCES = TOLERANCES | {torch.float32: 2e-5}

declare_references(
    "delta",
    {Paradigm.RECURRENT: (delta_recurrent, TOLERANCES), Paradigm.CHUNKWISE: (delta_chunkwise, CHUNKWISE_TOLERANCES)},
)

DELTA = Family("delta", PARADIGMS, delta_flops, segment_map, torch.matmul)
"""The delta family, as mixers use it."""
