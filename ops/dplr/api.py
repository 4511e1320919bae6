"""The generalized delta rule: a diagonal plus rank-one transition, with separate keys to read and to write (DPLR).

Notation of ops/delta, which has the kernels; g = log_decay.

    S_t = (I + b_t a_t^T) P_t + k_t v_t^T,  P_t = diag(exp(g_t)) S_{t-1}    state  [H K V]
    o_t = scale * q_t S_t                                                   the query reads the updated state

a reads a value from the decayed state, and b is the key under which that value is added. RWKV-7 (arXiv 2503.14456)
uses both. If b is None, it is -k, and S_t = P_t + k_t (v_t - a_t^T P_t)^T needs fewer products. With a = e * k for an
erase gate e this is Gated DeltaNet-2; with a = k, and k times beta as the key that writes, it is the delta rule.

For a rank-one term c_t d_t^T S_{t-1} that reads the state before it decays, pass b = c and a = d exp(-g). This requires
decays that are bounded below, as in RWKV-7. The state stays bounded if I + b a^T does not lengthen any vector; the
caller must ensure this.
"""

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from ..decay.api import TOLERANCES, LogDecay
from ..delta.api import CHUNK_SIZE, CHUNKWISE_TOLERANCES, PARADIGMS, delta_flops, require_paradigm, segment_map
from ..delta.chunkwise import DeltaChunks
from ..delta.recurrent import DeltaRule
from ..recurrence.chunk_loop import chunkwise_kernel
from ..recurrence.family import Family, RecurrenceOutput, recur, require_decay
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

    The chunkwise paradigm (the default, with chunks of 64 tokens) takes time and memory linear in T, forward and
    backward. In the recurrent paradigm a token costs the same at every position. There is no parallel paradigm. The
    state is [N H K V].

    Args:
        q: queries.
        k: keys that write the values.
        v: values.
        a: keys that read the decayed state.
        b: keys that write the values read with a; None means -k.
        log_decay: natural log of the decay, <= 0, -inf allowed; None means no decay.
        call: the call of a mixer; None if you call the op directly, with `options`.
        scale: factor of the output, 1/sqrt(K) by default.
        options: keywords of a direct call, see `CallOptions`; the initial state decays before the first token reads it.

    Raises:
        SeqmixError: if shapes or dtypes do not fit, or an option is invalid.
    """
    if call is None:
        require_decay(log_decay)
    call = Call.resolve(call, q.shape[1], options, op="dplr", paradigm=Paradigm.CHUNKWISE, chunk_size=CHUNK_SIZE)
    require_paradigm(call.paradigm)
    return recur(DPLR, q, k, v, call, a=a, b=b, log_decay=log_decay, scale=scale)


declare_references(
    "dplr",
    {
        Paradigm.RECURRENT: (recurrent_kernel("dplr_recurrent", DeltaRule()), TOLERANCES),
        Paradigm.CHUNKWISE: (chunkwise_kernel("dplr_chunkwise", DeltaChunks), CHUNKWISE_TOLERANCES),
    },
)

DPLR = Family("dplr", PARADIGMS, delta_flops, segment_map, torch.matmul)
"""The family of this op, as mixers use it; pass `n_keys=2` to its `flops` for calls with b."""
