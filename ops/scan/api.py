"""The scan family: recurrences whose state decays and is updated element by element.

Notation: B batch, T tokens, C channels, K keys, N packed documents; a = log_decay.

    scan        h_t = exp(a_t) h_{t-1} + x_t                  state  [C], or of any shape; the output is h_t
    log scan    h_t = log(exp(a_t + h_{t-1}) + exp(x_t))      scan of exp(x), in logarithms so that nothing overflows
    selective   h_t = exp(step_t rate) h_{t-1} + k_t x_t^T    state  [K C]; o_t = q_t h_t
    diagonal    h_t = exp(a + i angle) h_{t-1} + x_t          state  [K C], complex; o_t = Re(sum_k w h_t)

The recurrent paradigm computes one token after another. The chunkwise paradigm computes several blocks of `chunk_size`
tokens at once. Both are linear in T, forward and backward. A log-decay of -inf is allowed and resets the state.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...registry import SeqmixError
from ..recurrence.family import SLOW, require_chunk_size, require_decay, require_packing, split_decay
from ..runtime.call import Call, CallOptions
from ..runtime.custom_op import Op
from ..runtime.kernel import FLOATS, chosen, declare_references
from ..runtime.packing import Documents
from ..runtime.paradigm import Paradigm
from .blocks import state_dtype
from .diagonal import DIAGONAL, Diagonal
from .elementwise import SCAN, Scan
from .logarithmic import LOG_SCAN, LOG_STATE
from .selective import SELECTIVE, Selective

SCAN_PARADIGMS = frozenset({Paradigm.RECURRENT, Paradigm.CHUNKWISE})
"""Paradigms of the scan family."""

X = TypeVar("X", Scan, Selective, Diagonal)

Backend = Literal["auto", "reference", "native"]
"""Kernel backend. `auto` is resolved when a model is built: `native` (C++) on a CPU that has a compiler, else
`reference`, plain torch."""


class ScanOutput(NamedTuple):
    """Result of a scan."""

    output: Float[Tensor, "B T *_"]
    """Output, in the dtype of x."""
    final_state: Float[Tensor, "N *_"] | None
    """State after the last token, float32 (float64 for float64 inputs and `log_scan`); None unless requested."""


def scan(
    x: Float[Tensor, "B T *E"],
    log_decay: Float[Tensor, "B T *E"],
    call: Call | None = None,
    **options: Unpack[CallOptions],
) -> ScanOutput:
    """Compute h_t = exp(log_decay_t) h_{t-1} + x_t for every element; the output is h_t, the state [N *E].

    In a context-parallel group the scan runs twice: from zero, to learn how the segment maps a state, and then from the
    segment's true initial state.

    Args:
        x: inputs, [B T C], or with further dimensions.
        log_decay: natural log of the decay, <= 0, -inf allowed; same shape as x.
        call: the mixer's call; None if you call the op directly, with `options`.
        options: `CallOptions`; the initial state decays before the first token is added. Chunks have 64 tokens.

    Raises:
        SeqmixError: shapes or dtypes do not match; the paradigm does not exist, or is the parallel one; an input has a
            tangent (forward-mode differentiation is supported for a single recurrent token only).
    """
    if call is None:
        require_decay(log_decay)
    call = Call.resolve(call, x.shape[1], options, op="scan", paradigm=Paradigm.CHUNKWISE, chunk_size=64)
    _require_same_shape(x, log_decay, call)
    if _is_step(x, call):
        kept, change = split_decay(log_decay[:, 0].to(state_dtype(x))).unbind(0)
        state = _initial_state(x, call, x.shape[2:])
        h = kept * state + (change * state + x[:, 0].to(state_dtype(x)))
        return ScanOutput(h.to(x.dtype)[:, None], h if call.return_state else None)
    if call.cp_group is None:
        return _run("scan", Scan(x, log_decay, *_call_fields(call)), call)
    total = _mask_to_last_document(log_decay.to(state_dtype(x)), call.documents).sum(1)
    return _run_in_group("scan", Scan(x, log_decay, *_call_fields(call)), call, total.exp())


def log_scan(
    x: Float[Tensor, "B T *E"],
    log_decay: Float[Tensor, "B T *E"],
    call: Call | None = None,
    **options: Unpack[CallOptions],
) -> ScanOutput:
    """Compute h_t = log(exp(log_decay_t + h_{t-1}) + exp(x_t)): `scan` of exp(x) in the log domain, without overflow.

    Args:
        x: logarithms of the inputs, finite.
        log_decay: natural log of the decay, <= 0, -inf allowed; same shape as x.
        call: the mixer's call; None if you call the op directly, with `options`.
        options: `CallOptions`; no initial state means -inf, the logarithm of 0. States are float64. Chunks have 64
            tokens.

    Raises:
        SeqmixError: for the same reasons as `scan`.
    """
    if call is None:
        require_decay(log_decay)
    call = Call.resolve(call, x.shape[1], options, op="log_scan", paradigm=Paradigm.CHUNKWISE, chunk_size=64)
    _require_same_shape(x, log_decay, call)
    if _is_step(x, call):
        before = x.new_full(x[:, 0].shape, -torch.inf, dtype=LOG_STATE) if call.state is None else call.state
        h = torch.logaddexp(x[:, 0].to(LOG_STATE), log_decay[:, 0] + before.to(LOG_STATE))
        return ScanOutput(h.to(x.dtype)[:, None], h if call.return_state else None)
    if call.cp_group is None:
        return _run("log_scan", Scan(x, log_decay, *_call_fields(call)), call)
    if call.state is None:
        start = x.new_full((call.rows(x.shape[0]), *x.shape[2:]), -torch.inf, dtype=LOG_STATE)
        call = call._replace(state=start)
    total = _mask_to_last_document(log_decay.to(LOG_STATE), call.documents).sum(1)
    inputs = Scan(x, log_decay, *_call_fields(call))
    return _run_in_group("log_scan", inputs, call, total, torch.add, torch.logaddexp)


def selective_scan(
    x: Float[Tensor, "B T C"],
    step: Float[Tensor, "B T C"],
    rate: Float[Tensor, "K C"],
    k: Float[Tensor, "B T K"],
    q: Float[Tensor, "B T K"],
    call: Call | None = None,
    **options: Unpack[CallOptions],
) -> ScanOutput:
    """Compute h_t = exp(step_t rate) h_{t-1} + k_t x_t^T; the output is q_t h_t.

    Only the states of a few blocks of tokens are in memory at a time.

    Args:
        x: inputs, one scalar per channel.
        step: step sizes, >= 0.
        rate: log-decay per unit of step, <= 0.
        k: keys.
        q: queries.
        call: the mixer's call; None if you call the op directly, with `options`.
        options: `CallOptions`; the initial state [N K C] decays before the first token is added. Chunks have 16 tokens.

    Raises:
        SeqmixError: for the same reasons as `scan`.
    """
    call = Call.resolve(call, x.shape[1], options, op="selective_scan", paradigm=Paradigm.CHUNKWISE, chunk_size=16)
    shapes = [list(tensor.shape) for tensor in (x, step, rate, k, q)]
    if x.ndim != 3 or x.shape[1] < 1 or rate.ndim != 2 or shapes != _selective_shapes(x, rate):
        raise SeqmixError(
            "selective_scan expects x and step [B T C] with T >= 1, rate [K C], k and q [B T K], got "
            f"{', '.join(map(str, shapes))}"
        )
    _require_scan(x, step, rate, k, q, call=call, shape=tuple(rate.shape))
    dtype = state_dtype(x)
    if _is_step(x, call):
        decay = (step[:, 0, None].to(dtype) * rate.to(dtype)).exp()
        written = k[:, 0, :, None].to(dtype) * x[:, 0, None].to(dtype)
        h = decay * _initial_state(x, call, rate.shape) + written
        o = (q[:, 0, None].to(dtype) @ h).to(x.dtype)
        return ScanOutput(o, h if call.return_state else None)
    inputs = Selective(x, step, rate, k, q, *_call_fields(call))
    if call.cp_group is None:
        return _run("selective_scan", inputs, call)
    total = _mask_to_last_document(step.to(dtype), call.documents).sum(1)
    return _run_in_group("selective_scan", inputs, call, (total[:, None] * rate.to(dtype)).exp())


def diagonal_scan(
    x: Float[Tensor, "B T C"],
    log_decay: Float[Tensor, "K C"],
    angle: Float[Tensor, "K C"],
    weight: Float[Tensor, "K C 2"],
    call: Call | None = None,
    **options: Unpack[CallOptions],
) -> ScanOutput:
    """Compute h_t = exp(log_decay + i angle) h_{t-1} + x_t with complex h; the output is Re(sum_k weight h_t).

    Complex numbers are pairs of real ones in the last dimension: weights are [K C 2], states [N K C 2].

    Args:
        x: inputs, one scalar per channel.
        log_decay: natural log of the decays, <= 0, the same for all tokens.
        angle: rotation of the states per token, in radians.
        weight: complex weights of the output.
        call: the mixer's call; None if you call the op directly, with `options`.
        options: `CallOptions`; the initial state decays before the first token is added. Chunks have 16 tokens.

    Raises:
        SeqmixError: for the same reasons as `scan`.
    """
    if call is None:
        require_decay(log_decay)
    call = Call.resolve(call, x.shape[1], options, op="diagonal_scan", paradigm=Paradigm.CHUNKWISE, chunk_size=16)
    shapes = [list(tensor.shape) for tensor in (x, log_decay, angle, weight)]
    if x.ndim != 3 or x.shape[1] < 1 or shapes[1:] != _diagonal_shapes(x, log_decay):
        raise SeqmixError(
            "diagonal_scan expects x [B T C] with T >= 1, log_decay and angle [K C], weight [K C 2], got "
            f"{', '.join(map(str, shapes))}"
        )
    state = (*log_decay.shape, 2)
    _require_scan(x, log_decay, angle, weight, call=call, shape=state)
    dtype = state_dtype(x)
    if _is_step(x, call):
        # as in `split_decay`, slow factors are 1 + change; what change loses by rounding is added too
        decay = _polar(log_decay, angle)
        slow = (decay - F.pad(torch.ones_like(decay[..., :1]), (0, 1))).norm(dim=-1, keepdim=True) < SLOW
        exact = decay - F.pad(slow.to(decay.dtype), (0, 1))
        change = exact.to(dtype)
        before = _initial_state(x, call, torch.Size(state))
        written = F.pad(x[:, 0, None, :, None].to(dtype), (0, 1))
        written = _complex_product((exact - change).to(dtype), before) + written
        h = slow * before + (_complex_product(change, before) + written)
        real, imaginary = (weight.to(dtype) * h).unbind(-1)
        return ScanOutput((real - imaginary).sum(1).to(x.dtype)[:, None], h if call.return_state else None)
    inputs = Diagonal(x, log_decay, angle, weight, *_call_fields(call))
    if call.cp_group is None:
        return _run("diagonal_scan", inputs, call)
    tokens = _mask_to_last_document(x.new_ones(1, x.shape[1], 1, dtype=dtype), call.documents).sum()
    transition = _polar(tokens * log_decay.double(), tokens * angle.double()).to(dtype)
    return _run_in_group("diagonal_scan", inputs, call, transition[None], _complex_product)


def _diagonal_shapes(x: Tensor, log_decay: Tensor) -> list[list[int]]:
    """Return the shapes that log_decay, angle and weight must have."""
    shape = [log_decay.shape[0], x.shape[2]]
    return [shape, shape, [*shape, 2]]


def _polar(log_decay: Tensor, angle: Tensor) -> Tensor:
    """Return exp(log_decay + i angle) as pairs of real numbers, float64."""
    log_decay = log_decay.double()
    angle = angle.double()  # a large angle loses the digits that matter in float32
    return log_decay.exp()[..., None] * torch.stack((angle.cos(), angle.sin()), dim=-1)


def _complex_product(x: Tensor, y: Tensor) -> Tensor:
    """Return the product of complex numbers, stored as pairs of real ones."""
    (a, b), (c, d) = x.unbind(-1), y.unbind(-1)
    return torch.stack((a * c - b * d, a * d + b * c), dim=-1)


def _selective_shapes(x: Tensor, rate: Tensor) -> list[list[int]]:
    """Return the shapes that x, step, rate, k and q must have."""
    (batch, length, channels), keys = x.shape, rate.shape[0]
    return [[batch, length, channels]] * 2 + [[keys, channels]] + [[batch, length, keys]] * 2


def _call_fields(call: Call) -> tuple[Any, ...]:
    """Return the fields that every scan's inputs take from the call, in their order."""
    return (
        call.state,
        call.cu_seqlens,
        None if call.documents is None else call.documents.boundaries,
        call.chunk_size,
        call.return_state,
        call.paradigm is Paradigm.RECURRENT,
    )


def _is_step(x: Tensor, call: Call) -> bool:
    """True if the call is one decoding step, computed by plain operations that a compiler can fuse with others."""
    one_token = x.shape[1] == 1 and call.paradigm is Paradigm.RECURRENT
    return one_token and call.documents is None and call.cp_group is None


def _initial_state(x: Tensor, call: Call, shape: torch.Size) -> Tensor:
    """Return the call's initial state, or zeros, in the dtype of states."""
    if call.state is None:
        return x.new_zeros((x.shape[0], *shape), dtype=state_dtype(x))
    return call.state.to(state_dtype(x))


def _run(op: str, x: X, call: Call) -> ScanOutput:
    """Run the kernel that a call selects on the tokens of this process alone."""
    return ScanOutput(*chosen(op, call.paradigm, call.backend, x.x).function(x))


def _run_in_group(
    op: str,
    x: X,
    call: Call,
    transition: Tensor,
    apply: Callable[[Tensor, Tensor], Tensor] = torch.mul,
    add: Callable[[Tensor, Tensor], Tensor] = torch.add,
) -> ScanOutput:
    """Run a scan on this process's segment of a row that a context-parallel group shares.

    A segment maps the state before it to M S + U. `transition` is M; U is the final state of a first run from zero.
    `apply` and `add` are that map's product and sum (for logarithms: a sum and a logaddexp).
    """
    cp = call.cp_group
    documents = call.documents
    length = x.x.shape[1]
    assert cp is not None
    local = cp.local(documents, length)
    cu_seqlens: Any = None if local is None else local.cu_seqlens
    boundaries: Any = None if local is None else local.boundaries
    x = x._replace(cu_seqlens=cu_seqlens, boundaries=boundaries)
    _, written = _run(op, x._replace(initial_state=None, output_final_state=True), call)
    assert written is not None
    state = cp.entry(transition, cp.last_row(written, documents), call.state, documents, length, apply, add)
    result = _run(op, x._replace(initial_state=state), call)
    final = None if result.final_state is None else cp.final(result.final_state, documents, length)
    return ScanOutput(result.output, final)


def _mask_to_last_document(values: Tensor, documents: Documents | None) -> Tensor:
    """Return the values [B T ..] of the last document's tokens, and zeros for other tokens."""
    if documents is None:
        return values
    in_last = (documents.of_token == documents.of_token[-1]).view(-1, *[1] * (values.ndim - 2))
    return torch.where(in_last, values, 0)


def _require_same_shape(x: Tensor, log_decay: Tensor, call: Call) -> None:
    """Raise a SeqmixError for inputs that `scan` and `log_scan` do not accept."""
    if x.shape != log_decay.shape or x.ndim < 3 or x.shape[1] < 1:
        raise SeqmixError(
            "scan expects x and log_decay of the same shape, [B T C] with T >= 1 (more dimensions are allowed), got "
            f"{list(x.shape)}, {list(log_decay.shape)}"
        )
    _require_scan(x, log_decay, call=call, shape=tuple(x.shape[2:]))


def _require_scan(*tensors: Tensor, call: Call, shape: tuple[int, ...]) -> None:
    """Raise a SeqmixError for dtypes, states, packing or paradigms that no scan accepts."""
    x = tensors[0]
    require_floats(*tensors)
    if call.paradigm is Paradigm.PARALLEL:
        raise SeqmixError("a scan expects the recurrent or chunkwise paradigm, got parallel: set paradigm=chunkwise")
    require_packing(x, call.cu_seqlens)
    require_chunk_size(call.chunk_size)
    expected = [call.rows(x.shape[0]), *shape]
    if call.state is not None and list(call.state.shape) != expected:
        raise SeqmixError(f"the initial state must be {expected}, got {list(call.state.shape)}")


def require_floats(*tensors: Tensor) -> None:
    """Raise a SeqmixError for dtypes that no scan accepts."""
    if any(tensor.dtype not in FLOATS for tensor in tensors):
        raise SeqmixError(f"a scan expects floating-point tensors, got {', '.join(str(t.dtype) for t in tensors)}")


def _reference(op: Op[X]) -> Callable[[X], ScanOutput]:
    """Return the function of a reference kernel, from its op."""

    def run(x: X) -> ScanOutput:
        output, final_state, _ = op(x)
        return ScanOutput(output, final_state if x.output_final_state else None)

    return run


TOLERANCES = {torch.float64: 2e-13, torch.float32: 1e-5, torch.bfloat16: 7e-3, torch.float16: 9e-4}

for _name, _op in {"scan": SCAN, "log_scan": LOG_SCAN, "selective_scan": SELECTIVE, "diagonal_scan": DIAGONAL}.items():
    declare_references(_name, dict.fromkeys(sorted(SCAN_PARADIGMS), (_reference(_op), TOLERANCES)))
