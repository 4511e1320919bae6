"""The scan family: a state that decays and is written element by element.

Notation: B batch, T tokens, C channels, K keys, N packed documents; a = log_decay.

    scan        h_t = exp(a_t) h_{t-1} + x_t                  state  [C], or of any shape; the output is h_t
    log scan    h_t = log(exp(a_t + h_{t-1}) + exp(x_t))      the same of exponentials, which floats cannot hold
    selective   h_t = exp(step_t rate) h_{t-1} + k_t x_t^T    state  [K C]; o_t = q_t h_t
    diagonal    h_t = exp(a + i angle) h_{t-1} + x_t          state  [K C], complex; o_t = Re(sum_k w h_t)

The recurrent paradigm goes token by token, the chunkwise one by blocks of `chunk_size` tokens, several of them side by
side. Both are linear in T, forward and backward. A log-decay of -inf is legal and resets the state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...registry import SeqmixError
from ..recurrence.family import require_chunk_size, require_packing
from ..runtime.call import Call, CallOptions
from ..runtime.custom_op import Op
from ..runtime.kernel import FLOATS
from ..runtime.packing import Documents
from ..runtime.paradigm import Paradigm
from .blocks import wide
from .diagonal import DIAGONAL, Diagonal
from .elementwise import SCAN, Scan
from .logarithmic import LOG_SCAN
from .selective import SELECTIVE, Selective

SCAN_PARADIGMS = frozenset({Paradigm.RECURRENT, Paradigm.CHUNKWISE})
"""Those that the family has."""

X = TypeVar("X", Scan, Selective, Diagonal)


class ScanOutput(NamedTuple):
    """What a scan returns."""

    output: Float[Tensor, "B T *_"]
    """In the dtype of x."""
    final_state: Float[Tensor, "N *_"] | None
    """float32 (float64 of float64 inputs); None unless wanted."""


def scan(
    x: Float[Tensor, "B T *E"],
    log_decay: Float[Tensor, "B T *E"],
    call: Call | None = None,
    **options: Unpack[CallOptions],
) -> ScanOutput:
    """h_t = exp(log_decay_t) h_{t-1} + x_t for every element by itself; the output is h_t, the state [N *E].

    In a context-parallel group it is computed twice: for what the segment does with any state, and from its own.

    Args:
        x: what is written, [B T C], or with further dimensions.
        log_decay: natural log of the decay, <= 0, -inf allowed; of the shape of x.
        call: the call of a mixer; None for those who call the op by itself, with `options`.
        options: `CallOptions`; the initial state decays before the first token is added. Chunks have 64 tokens.

    Raises:
        SeqmixError: shapes or dtypes do not fit; the paradigm does not exist, or is the parallel one; an input has a
            tangent, as there is no forward-mode differentiation but of one token.
    """
    call = Call.given(call, x.shape[1], options, paradigm=Paradigm.CHUNKWISE, chunk_size=64)
    _require_alike(x, log_decay, call)
    if _is_step(x, call):
        h = log_decay[:, 0].to(wide(x)).exp() * _state(x, call, x.shape[2:]) + x[:, 0].to(wide(x))
        return ScanOutput(h.to(x.dtype)[:, None], h if call.return_state else None)
    if call.cp_group is None:
        return _output(SCAN, Scan(x, log_decay, *_common(call)))
    total = _of_last(log_decay.to(wide(x)), call.documents).sum(1)
    return _in_group(SCAN, Scan(x, log_decay, *_common(call)), call, total.exp())


def log_scan(
    x: Float[Tensor, "B T *E"],
    log_decay: Float[Tensor, "B T *E"],
    call: Call | None = None,
    **options: Unpack[CallOptions],
) -> ScanOutput:
    """h_t = log(exp(log_decay_t + h_{t-1}) + exp(x_t)): `scan` of exponentials that floats cannot hold.

    Args:
        x: logarithm of what is written, finite.
        log_decay: as of `scan`.
        call: the call of a mixer; None for those who call the op by itself, with `options`.
        options: `CallOptions`; no initial state means -inf, the logarithm of 0. Chunks have 64 tokens.

    Raises:
        SeqmixError: as of `scan`.
    """
    call = Call.given(call, x.shape[1], options, paradigm=Paradigm.CHUNKWISE, chunk_size=64)
    _require_alike(x, log_decay, call)
    dtype = wide(x)
    if _is_step(x, call):
        before = x.new_full(x[:, 0].shape, -torch.inf, dtype=dtype) if call.state is None else call.state.to(dtype)
        h = torch.logaddexp(x[:, 0].to(dtype), log_decay[:, 0].to(dtype) + before)
        return ScanOutput(h.to(x.dtype)[:, None], h if call.return_state else None)
    if call.cp_group is None:
        return _output(LOG_SCAN, Scan(x, log_decay, *_common(call)))
    if call.state is None:
        start = x.new_full((call.rows(x.shape[0]), *x.shape[2:]), -torch.inf, dtype=dtype)
        call = call._replace(state=start)
    total = _of_last(log_decay.to(dtype), call.documents).sum(1)
    return _in_group(LOG_SCAN, Scan(x, log_decay, *_common(call)), call, total, torch.add, torch.logaddexp)


def selective_scan(
    x: Float[Tensor, "B T C"],
    step: Float[Tensor, "B T C"],
    rate: Float[Tensor, "K C"],
    k: Float[Tensor, "B T K"],
    q: Float[Tensor, "B T K"],
    call: Call | None = None,
    **options: Unpack[CallOptions],
) -> ScanOutput:
    """h_t = exp(step_t rate) h_{t-1} + k_t x_t^T, and q_t h_t as output; states exist for a few blocks at a time.

    Args:
        x: what is written, a scalar per channel.
        step: step sizes, >= 0.
        rate: <= 0, the log-decay per unit of step.
        k: keys.
        q: queries.
        call: the call of a mixer; None for those who call the op by itself, with `options`.
        options: `CallOptions`; the initial state [N K C] decays before the first token is added. Chunks have 16 tokens.

    Raises:
        SeqmixError: as of `scan`.
    """
    call = Call.given(call, x.shape[1], options, paradigm=Paradigm.CHUNKWISE, chunk_size=16)
    shapes = [list(tensor.shape) for tensor in (x, step, rate, k, q)]
    if x.ndim != 3 or x.shape[1] < 1 or rate.ndim != 2 or shapes != _selective_shapes(x, rate):
        raise SeqmixError(
            "x and step must be [B T C] with T >= 1, the rate [K C], k and q [B T K]; given are "
            f"{', '.join(map(str, shapes))}"
        )
    _require((x, step, rate, k, q), call, tuple(rate.shape))
    dtype = wide(x)
    if _is_step(x, call):
        decay = (step[:, 0, None].to(dtype) * rate.to(dtype)).exp()
        written = k[:, 0, :, None].to(dtype) * x[:, 0, None].to(dtype)
        h = decay * _state(x, call, rate.shape) + written
        o = (q[:, 0, None].to(dtype) @ h).to(x.dtype)
        return ScanOutput(o, h if call.return_state else None)
    given = Selective(x, step, rate, k, q, *_common(call))
    if call.cp_group is None:
        return _output(SELECTIVE, given)
    total = _of_last(step.to(dtype), call.documents).sum(1)
    return _in_group(SELECTIVE, given, call, (total[:, None] * rate.to(dtype)).exp())


def diagonal_scan(
    x: Float[Tensor, "B T C"],
    log_decay: Float[Tensor, "K C"],
    angle: Float[Tensor, "K C"],
    weight: Float[Tensor, "K C 2"],
    call: Call | None = None,
    **options: Unpack[CallOptions],
) -> ScanOutput:
    """h_t = exp(log_decay + i angle) h_{t-1} + x_t, complex, and Re(sum_k weight h_t) as output.

    Args:
        x: what is written, a scalar per channel.
        log_decay: natural log of the decays, <= 0, the same for all tokens.
        angle: rotation of the states per token, in radians.
        weight: the output's complex weights, as pairs of real numbers, as states are: [N K C 2].
        call: the call of a mixer; None for those who call the op by itself, with `options`.
        options: `CallOptions`; the initial state decays before the first token is added. Chunks have 16 tokens.

    Raises:
        SeqmixError: as of `scan`.
    """
    call = Call.given(call, x.shape[1], options, paradigm=Paradigm.CHUNKWISE, chunk_size=16)
    shapes = [list(tensor.shape) for tensor in (x, log_decay, angle, weight)]
    if x.ndim != 3 or x.shape[1] < 1 or shapes[1:] != _diagonal_shapes(x, log_decay):
        raise SeqmixError(
            "x must be [B T C] with T >= 1, log_decay and angle [K C], the weight [K C 2]; given are "
            f"{', '.join(map(str, shapes))}"
        )
    state = (*log_decay.shape, 2)
    _require((x, log_decay, angle, weight), call, state)
    dtype = wide(x)
    if _is_step(x, call):
        turned = _times(_polar(log_decay, angle).to(dtype), _state(x, call, torch.Size(state)))
        h = turned + F.pad(x[:, 0, None, :, None].to(dtype), (0, 1))
        real, imaginary = (weight.to(dtype) * h).unbind(-1)
        return ScanOutput((real - imaginary).sum(1).to(x.dtype)[:, None], h if call.return_state else None)
    given = Diagonal(x, log_decay, angle, weight, *_common(call))
    if call.cp_group is None:
        return _output(DIAGONAL, given)
    counted = _of_last(x.new_ones(1, x.shape[1], 1, dtype=dtype), call.documents).sum()
    transition = _polar(counted * log_decay.double(), counted * angle.double()).to(dtype)
    return _in_group(DIAGONAL, given, call, transition[None], _times)


def _diagonal_shapes(x: Tensor, log_decay: Tensor) -> list[list[int]]:
    shape = [log_decay.shape[0], x.shape[2]]
    return [shape, shape, [*shape, 2]]


def _polar(log_decay: Tensor, angle: Tensor) -> Tensor:
    """exp(log_decay + i angle) as pairs of real numbers."""
    log_decay = log_decay.double()
    angle = angle.double()  # an angle of many turns has few digits left
    return log_decay.exp()[..., None] * torch.stack((angle.cos(), angle.sin()), dim=-1)


def _times(x: Tensor, y: Tensor) -> Tensor:
    """The product of complex numbers, as pairs of real ones."""
    (a, b), (c, d) = x.unbind(-1), y.unbind(-1)
    return torch.stack((a * c - b * d, a * d + b * c), dim=-1)


def _selective_shapes(x: Tensor, rate: Tensor) -> list[list[int]]:
    (batch, length, channels), keys = x.shape, rate.shape[0]
    return [[batch, length, channels]] * 2 + [[keys, channels]] + [[batch, length, keys]] * 2


def _common(call: Call) -> tuple[Any, ...]:
    """The fields of a call that all scans have, of the tokens of this process."""
    return (
        call.state,
        call.cu_seqlens,
        None if call.documents is None else call.documents.boundaries,
        call.chunk_size,
        call.return_state,
        call.paradigm is Paradigm.RECURRENT,
    )


def _is_step(x: Tensor, call: Call) -> bool:
    """Whether plain operations compute it, which a compiler fuses with what surrounds them: decoding."""
    one = x.shape[1] == 1 and call.paradigm is Paradigm.RECURRENT
    return one and call.documents is None and call.cp_group is None


def _state(x: Tensor, call: Call, shape: torch.Size) -> Tensor:
    if call.state is None:
        return x.new_zeros((x.shape[0], *shape), dtype=wide(x))
    return call.state.to(wide(x))


def _output(op: Op[X], x: X) -> ScanOutput:
    output, final_state, _ = op(x)
    return ScanOutput(output, final_state if x.output_final_state else None)


def _in_group(
    op: Op[X],
    x: X,
    call: Call,
    transition: Tensor,
    apply: Callable[[Tensor, Tensor], Tensor] = torch.mul,
    add: Callable[[Tensor, Tensor], Tensor] = torch.add,
) -> ScanOutput:
    """Of a segment's tokens, where `transition` is M of S -> M S + U, the segment as a map of the state."""
    cp = call.cp_group
    documents = call.documents
    length = x.x.shape[1]
    assert cp is not None
    local = cp.local(documents, length)
    packed: tuple[Any, Any] = (None, None) if local is None else (local.cu_seqlens, local.boundaries)
    x = x._replace(cu_seqlens=packed[0], boundaries=packed[1])
    _, written, _ = op(x._replace(initial_state=None, output_final_state=True))
    state = cp.entry(transition, cp.last_row(written, documents), call.state, documents, length, apply, add)
    found = _output(op, x._replace(initial_state=state))
    final = None if found.final_state is None else cp.final(found.final_state, documents, length)
    return ScanOutput(found.output, final)


def _of_last(log_decay: Tensor, documents: Documents | None) -> Tensor:
    """Log-decays of the last document's tokens, and zeros for others."""
    if documents is None:
        return log_decay
    counted = (documents.of_token == documents.of_token[-1]).view(-1, *[1] * (log_decay.ndim - 2))
    return torch.where(counted, log_decay, 0)


def _require_alike(x: Tensor, log_decay: Tensor, call: Call) -> None:
    """Refuse what `scan` and `log_scan` do not take."""
    if x.shape != log_decay.shape or x.ndim < 3 or x.shape[1] < 1:
        raise SeqmixError(
            f"x and log_decay must be [B T C], or with further dimensions, and T >= 1; given are {list(x.shape)}, "
            f"{list(log_decay.shape)}"
        )
    _require((x, log_decay), call, tuple(x.shape[2:]))


def _require(tensors: tuple[Tensor, ...], call: Call, shape: tuple[int, ...]) -> None:
    """Refuse dtypes, states, packing and paradigms that no scan takes."""
    x = tensors[0]
    if any(tensor.dtype not in FLOATS for tensor in tensors):
        raise SeqmixError(
            f"a scan is of floating-point numbers, and was given {', '.join(str(t.dtype) for t in tensors)}"
        )
    if call.paradigm is Paradigm.PARALLEL:
        raise SeqmixError("a scan is recurrent or chunkwise, not parallel")
    require_packing(x, call.cu_seqlens)
    require_chunk_size(call.chunk_size)
    needed = [call.rows(x.shape[0]), *shape]
    if call.state is not None and list(call.state.shape) != needed:
        raise SeqmixError(f"the initial state must be {needed}, and is {list(call.state.shape)}")
