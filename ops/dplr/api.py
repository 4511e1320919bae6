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

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..decay.api import TOLERANCES, LogDecay
from ..delta.api import CHUNKWISE_TOLERANCES, PARADIGMS, delta_flops, require_paradigm, segment
from ..delta.chunkwise import DeltaChunks
from ..delta.recurrent import DeltaRule
from ..recurrence.chunk_loop import chunkwise_kernel
from ..recurrence.family import Family, RecurrenceOutput, recur
from ..recurrence.token_loop import recurrent_kernel
from ..runtime.call import Call
from ..runtime.kernel import declare_references
from ..runtime.paradigm import Paradigm


def dplr(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor | None, log_decay: LogDecay, call: Call, scale: float | None
) -> RecurrenceOutput:
    """The same for mixers, which pass a `Call`; the state is [N H K V]. The tensors are those of `dplr_recurrence`.

    Raises:
        SeqmixError: shapes or dtypes do not fit, or the paradigm does not exist.
    """
    require_paradigm(call.paradigm)
    return recur(DPLR, q, k, v, call, a=a, b=b, log_decay=log_decay, scale=scale)


def dplr_recurrence(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    a: Float[Tensor, "B T H K"],
    b: Float[Tensor, "B T H K"] | None = None,
    log_decay: LogDecay = None,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
    paradigm: Paradigm | str = Paradigm.CHUNKWISE,
    chunk_size: int = 64,
    backend: str = "reference",
) -> RecurrenceOutput:
    """The same for those who call an op by itself; its further options are those of `Call.of`.

    Chunkwise it is linear in T, in time and memory, forward and backward; recurrent, one token costs the same at every
    position.

    Args:
        q: queries.
        k: keys.
        v: values.
        a: what reads the decayed state.
        b: where what a reads is added; None is -k.
        log_decay: natural log of the decay, <= 0, -inf allowed; None means no decay.
        scale: factor of the output, 1/sqrt(K) by default.
        initial_state: it decays before the first token reads it.
        paradigm: chunkwise or recurrent.

    Raises:
        SeqmixError: shapes or dtypes do not fit, or the paradigm does not exist.
    """
    call = Call.of(paradigm, q.shape[1], initial_state, output_final_state, cu_seqlens, chunk_size, backend)
    return dplr(q, k, v, a, b, log_decay, call, scale)


declare_references(
    "dplr",
    {
        Paradigm.RECURRENT: (recurrent_kernel("dplr_recurrent", DeltaRule()), TOLERANCES),
        Paradigm.CHUNKWISE: (chunkwise_kernel("dplr_chunkwise", DeltaChunks), CHUNKWISE_TOLERANCES),
    },
)

DPLR = Family("dplr", PARADIGMS, delta_flops, segment, torch.matmul)
"""What mixers know of the family; `n_keys` of its flops is 1 where b is None, else 2."""
