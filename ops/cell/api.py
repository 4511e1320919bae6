"""The cell family: recurrences that are not linear in the state, so that tokens can only be computed one after another.

Notation: B batch, T tokens, H heads, D channels of a head, K keys, V values, N packed documents.

    sLSTM    i, f, z, o = g_t + h_{t-1} R;  c, n, h by exponential gates        state  h, c/n [H 2 D], log n [H D]
    M2RNN    S_t = e^{g_t} S_{t-1} + (1 - e^{g_t}) tanh(S_{t-1} W + k_t v_t^T)  state  S [H K V]

The recurrent paradigm is the only one. In exchange, such cells track states that no linear recurrence with decays from
0 to 1 can track, such as the parity of a sequence of bits.
"""

from typing import Literal, NamedTuple, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from ...registry import SeqmixError
from ..recurrence.family import Family, RecurrenceOutput, require_chunk_size, require_packing
from ..runtime.call import Call, CallOptions
from ..runtime.kernel import FLOATS, chosen, declare_references
from ..runtime.paradigm import Paradigm
from .m2rnn import M2RNN, m2rnn_recurrent
from .slstm import SLSTM, slstm_recurrent

CELL_PARADIGMS = frozenset({Paradigm.RECURRENT})
"""Paradigms of the cell family."""

Backend = Literal["auto", "reference", "native"]
"""Kernel backend. `auto` is resolved when a model is built: `native` (C++) on a CPU that has a compiler, else
`reference`, plain torch."""


class SLSTMOutput(NamedTuple):
    """Result of `slstm`."""

    output: Float[Tensor, "B T H D"]
    """Output h, in the dtype of the gates."""
    memory: Float[Tensor, "N H 2 D"] | None
    """h and a after the last token, float32 (float64 for float64 inputs); None unless requested."""
    weight: Float[Tensor, "N H D"] | None
    """l after the last token, float64; None unless requested."""


def slstm(
    gates: Float[Tensor, "B T H 4*D"],
    recurrent: Float[Tensor, "H D 4*D"],
    call: Call | None = None,
    *,
    exponential: bool = False,
    **options: Unpack[CallOptions],
) -> SLSTMOutput:
    """Compute the cell of sLSTM: c = f c + i tanh(z), n = f n + i, h = sigmoid(o) c / n, with i = exp(its logit).

    Args:
        gates: what each token adds to the logits of i, f, z and o, in this order.
        recurrent: matrices by which h_{t-1} is multiplied, for all four logits.
        call: the mixer's call; None if you call the op directly, with `options`.
        exponential: True if the forget gate is exp(f), False if it is sigmoid(f).
        options: `CallOptions`; the initial state is a pair (memory, weight) as in `SLSTMOutput`.

    Raises:
        SeqmixError: shapes or dtypes do not match, or the paradigm is not the recurrent one.
    """
    call = Call.resolve(call, gates.shape[1], options, op="slstm", paradigm=Paradigm.RECURRENT)
    _require_recurrent(call)
    heads, width = recurrent.shape[0], recurrent.shape[1]
    if gates.ndim != 4 or gates.shape[1] < 1 or gates.shape[2:] != (heads, 4 * width):
        raise SeqmixError(
            "slstm expects gates [B T H 4D] with T >= 1 and recurrent [H D 4D], got "
            f"{list(gates.shape)} and {list(recurrent.shape)}"
        )
    if recurrent.shape != (heads, width, 4 * width):
        raise SeqmixError(f"slstm expects recurrent [H D 4D], got {list(recurrent.shape)}")
    require_floats(gates, recurrent)
    require_packing(gates, call.cu_seqlens)
    memory, weight = (None, None) if call.state is None else call.state
    if memory is not None and weight is not None:
        shape = (call.rows(gates.shape[0]), heads, 2, width)
        if memory.shape != shape or weight.shape != (*shape[:2], width):
            raise SeqmixError(
                f"slstm expects an initial memory {list(shape)} and weight {[*shape[:2], width]}, got "
                f"{list(memory.shape)} and {list(weight.shape)}"
            )
    boundaries = None if call.documents is None else call.documents.boundaries
    x = SLSTM(gates, recurrent, memory, weight, call.cu_seqlens, boundaries, exponential, call.return_state)
    output, final = chosen("slstm", Paradigm.RECURRENT, call.backend, gates).function(x)
    return SLSTMOutput(output, *((None, None) if final is None else final))


def m2rnn(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H"],
    weight: Float[Tensor, "H V V"],
    call: Call | None = None,
    **options: Unpack[CallOptions],
) -> RecurrenceOutput:
    """Compute S_t = e^{g_t} S_{t-1} + (1 - e^{g_t}) tanh(S_{t-1} W + k_t v_t^T); the output is q_t S_t.

    Args:
        q: queries.
        k: keys.
        v: values.
        log_decay: natural log of the decays g, <= 0.
        weight: matrices W.
        call: the mixer's call; None if you call the op directly, with `options`.
        options: `CallOptions`. States before every `chunk_size` tokens, 128 by default, are saved for the backward
            pass, which recomputes the others.

    Raises:
        SeqmixError: shapes or dtypes do not match, or the paradigm is not the recurrent one.
    """
    call = Call.resolve(call, v.shape[1], options, op="m2rnn", paradigm=Paradigm.RECURRENT)
    _require_recurrent(call)
    values = v.shape[-1]
    fits = v.ndim == 4 and v.shape[1] >= 1 and q.shape == k.shape and k.shape[:3] == v.shape[:3]
    if not fits or log_decay.shape != v.shape[:3] or weight.shape != (v.shape[2], values, values):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (q, k, v, log_decay, weight))
        raise SeqmixError(
            "m2rnn expects q and k [B T H K] with T >= 1, v [B T H V], log_decay [B T H] and weight [H V V], "
            f"got {shapes}"
        )
    require_floats(q, k, v, log_decay, weight)
    require_packing(v, call.cu_seqlens)
    require_chunk_size(call.chunk_size)
    state = (call.rows(v.shape[0]), v.shape[2], k.shape[3], values)
    if call.state is not None and call.state.shape != state:
        raise SeqmixError(f"m2rnn expects an initial state {list(state)}, got {list(call.state.shape)}")
    boundaries = None if call.documents is None else call.documents.boundaries
    fields = (call.state, call.cu_seqlens, boundaries, call.chunk_size, call.return_state)
    x = M2RNN(q, k, v, log_decay, weight, *fields)
    return RecurrenceOutput(*chosen("m2rnn", Paradigm.RECURRENT, call.backend, v).function(x))


def _require_recurrent(call: Call) -> None:
    if call.paradigm is not Paradigm.RECURRENT:
        raise SeqmixError(f"a cell has only the recurrent paradigm, got {call.paradigm}")
    if call.cp_group is not None:
        raise SeqmixError("a cell cannot be split over processes: let the mixer pass its state from rank to rank")


def require_floats(*tensors: Tensor) -> None:
    """Raise a SeqmixError if an input is not a floating-point number of a supported dtype."""
    if wrong := [str(x.dtype).removeprefix("torch.") for x in tensors if x.dtype not in FLOATS]:
        raise SeqmixError(f"a cell expects floating-point inputs, got {', '.join(wrong)}")


def _m2rnn_flops(paradigm: Paradigm, length: int, key_width: int, value_width: int, **options: int) -> int:
    """Count the products S W and q S of one head."""
    del paradigm, options
    return 2 * length * key_width * value_width * (value_width + 1)


M2RNN_FAMILY = Family("m2rnn", CELL_PARADIGMS, _m2rnn_flops)
"""The family of `m2rnn`, as mixers use it."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
declare_references("slstm", {Paradigm.RECURRENT: (slstm_recurrent, TOLERANCES)})
declare_references("m2rnn", {Paradigm.RECURRENT: (m2rnn_recurrent, TOLERANCES)})
