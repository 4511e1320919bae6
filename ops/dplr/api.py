"""The delta rule in general: a transition that is diagonal plus rank one, with vectors that every token chooses.

Notation of ops/delta, whose kernels compute it; g = log_decay.

    S_t = (I + b_t a_t^T) P_t + k_t v_t^T,  P_t = diag(exp(g_t)) S_{t-1}    state  [H K V]
    o_t = scale * q_t S_t                                                   the query reads the updated state

a reads the decayed state, and b says where what it read is added. RWKV-7 (arXiv 2503.14456) has both. Where b is None
it is -k, of which only one product with the queries is formed: S_t = P_t + k_t (v_t - a_t^T P_t)^T. That is Gated
DeltaNet-2 with a = e * k for an erase gate e, and the delta rule with a = k and k times beta.

A rank-one term c_t d_t^T S_{t-1} that reads the state before it decays has a = d exp(-g), where the decays are bounded
below, as RWKV-7's are. The state stays bounded where I + b a^T lengthens no vector, and else is the caller's.
"""

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from ..decay.api import TOLERANCES, LogDecay
from ..delta.api import CHUNK_SIZE, CHUNKWISE_TOLERANCES, PARADIGMS, delta_flops, require_paradigm, segment
from ..delta.chunkwise import DeltaChunks
from ..delta.recurrent import DeltaRule
from ..recurrence.chunk_loop import chunkwise_kernel
from ..recurrence.family import Family, RecurrenceOutput, recur
from ..recurrence.token_loop import recurrent_kernel
from ..runtime.call import Call, CallOptions
from ..runtime.kernel import declare_references
from ..runtime.paradigm import Paradigm


def dplr(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    a: Float[Tensor, "B T H K"],
    b: Float[Tensor, "B T H K"] | None = None,
    log_decay: LogDecay = None,
    call: Call | None = None,
    *,
    scale: float | None = None,
    **options: Unpack[CallOptions],
) -> RecurrenceOutput:
    """Recurrence with a diagonal plus rank-one transition: S_t = (I + b_t a_t^T) P_t + k_t v_t^T, o_t = scale q_t S_t.

    Chunkwise (the default, in chunks of 64 tokens) it is linear in T, in time and memory, forward and backward;
    recurrent, one token costs the same at every position. There is no parallel paradigm. The state is [N H K V].

    Args:
        q: queries.
        k: keys.
        v: values.
        a: what reads the decayed state.
        b: where what a reads is added; None is -k.
        log_decay: natural log of the decay, <= 0, -inf allowed; None means no decay.
        call: the call of a mixer; None for those who call the op by itself, with `options`.
        scale: factor of the output, 1/sqrt(K) by default.
        options: `CallOptions`; the initial state decays before the first token reads it.

    Raises:
        SeqmixError: shapes or dtypes do not fit, or the paradigm does not exist.
    """
    call = Call.given(call, q.shape[1], options, paradigm=Paradigm.CHUNKWISE, chunk_size=CHUNK_SIZE)
    require_paradigm(call.paradigm)
    return recur(DPLR, q, k, v, call, a=a, b=b, log_decay=log_decay, scale=scale)


declare_references(
    "dplr",
    {
        Paradigm.RECURRENT: (recurrent_kernel("dplr_recurrent", DeltaRule()), TOLERANCES),
        Paradigm.CHUNKWISE: (chunkwise_kernel("dplr_chunkwise", DeltaChunks), CHUNKWISE_TOLERANCES),
    },
)

DPLR = Family("dplr", PARADIGMS, delta_flops, segment, torch.matmul)
"""What mixers know of the family; `n_keys` of its flops is 1 where b is None, else 2."""
