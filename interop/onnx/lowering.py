"""Lowering of seqmix's ops to ONNX: what each custom op of the recurrent paradigm becomes in an exported graph.

Each function takes the inputs of one custom op and computes its outputs by torch operations and by ONNX operators that
torch does not have. `torch.onnx` translates everything else. Recurrences become

    LinearAttention    decay, delta, scan, selective_scan: ONNX Runtime's operator, one loop over tokens in C++;
                       ridge_solve: one such loop per iteration
    Scan               dplr, log_scan, diagonal_scan: the functions of `loops`, whose bodies are one token's step
    Conv               long_convolution: a convolution as long as the text so far

The length of a segment is symbolic, so one graph processes prompts and single tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...ops import decay, delta, dplr  # noqa: F401 they register their ops
from ...ops.convolution.long import OP as LONG_CONVOLUTION
from ...ops.grouped_linear import OP as GROUPED_LINEAR
from ...ops.recurrence.family import Recurrence
from ...ops.ridge import RIDGE_SOLVE, System, conjugate_gradients
from ...ops.scan.diagonal import DIAGONAL, Diagonal
from ...ops.scan.elementwise import SCAN, Scan
from ...ops.scan.logarithmic import LOG_SCAN
from ...ops.scan.selective import SELECTIVE, Selective
from .loops import LOOPS

RECURRENCES = (
    torch.ops.seqmix.decay_recurrent.default,
    torch.ops.seqmix.delta_recurrent.default,
    torch.ops.seqmix.dplr_recurrent.default,
)
"""Ops of the recurrences with a matrix state; their inputs are a `Recurrence`."""
CONTRIB = "com.microsoft"
"""Domain of ONNX Runtime's own operators."""


def _linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor | None,
    log_decay: Tensor | None,
    beta: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the output [B T H V] and the final state [B H K V] of a linear recurrence.

    S_t = P_t + beta_t k_t (v_t - k_t^T P_t)^T, o_t = scale q_t S_t, with the decayed state P_t. Without beta, a token
    adds k_t v_t^T. The log-decay is [B T H] or [B T H K].
    """
    batch, length, heads, width = v.shape
    decayed = log_decay is not None
    rule = {(False, False): "linear", (True, False): "gated", (False, True): "delta", (True, True): "gated_delta"}
    inputs = [q.flatten(2), k.flatten(2), v.flatten(2), state, log_decay.flatten(2) if decayed else None, beta]
    output, final = torch.onnx.ops.symbolic_multi_out(
        f"{CONTRIB}::LinearAttention",
        [None if x is None else x.float() for x in inputs],
        {
            "q_num_heads": heads,
            "kv_num_heads": heads,
            "update_rule": rule[decayed, beta is not None],
            "scale": float(scale),
        },
        dtypes=[torch.float32, torch.float32],
        shapes=[(batch, length, heads * width), (batch, heads, k.shape[3], width)],
        version=1,
    )
    return output.unflatten(2, (heads, width)), final


def _loop(name: str, state: Tensor, constants: Sequence[Tensor], tokens: Sequence[Tensor], like: Tensor) -> Any:
    """Return the outputs, shaped as `like`, and the final state of a loop over tokens, a function of `loops`."""
    final, output = torch.onnx.ops.symbolic_multi_out(
        f"{LOOPS}::{name}",
        [state, *constants, *tokens],
        dtypes=[state.dtype, like.dtype],
        shapes=[state.shape, like.shape],
        version=1,
    )
    return output, final


def _recurrence(*args: Any) -> tuple[Tensor, ...]:
    """Decay and delta families."""
    x = Recurrence._make(args).by_head()
    log_decay = x.log_decay
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay.expand(x.v.shape[:3])
    output, final = _linear_attention(x.q, x.k, x.v, x.initial_state, log_decay, x.beta, scale=x.scale)
    return output.to(x.output_dtype), final, _nothing(x.q)


def _dplr(*args: Any) -> tuple[Tensor, ...]:
    """Diagonal plus rank-one transitions: S_t = (I + b_t a_t^T) exp(g_t) S_{t-1} + k_t v_t^T."""
    x = Recurrence._make(args)
    keys = x.k.shape
    assert x.a is not None
    b = -x.k if x.b is None else x.b
    log_decay = torch.zeros_like(x.k) if x.log_decay is None else x.log_decay
    log_decay = log_decay[(..., *[None] * (log_decay.ndim in (1, 3)))].expand(keys)
    state = x.k.new_zeros(keys[0], *x.state_shape) if x.initial_state is None else x.initial_state
    output, final = _loop("Dplr", state, [], [x.scale * x.q, x.k, x.v, x.a, b, log_decay], x.v)
    return output, final, _nothing(x.q)


def _scan(*args: Any) -> tuple[Tensor, ...]:
    """Elements as heads of 1 x 1, whose key and query are 1."""
    x = Scan._make(args)
    values = x.x.flatten(2)[..., None]
    state = None if x.initial_state is None else x.initial_state.flatten(1)[..., None, None]
    ones = torch.ones_like(values)
    output, final = _linear_attention(ones, ones, values, state, x.log_decay.flatten(2))
    final = final.reshape(x.x.shape[:1] + x.x.shape[2:])
    # RWKV-4 keeps it beside a float64 state: ONNX joins tensors of one dtype only
    final = final if x.initial_state is None else final.to(x.initial_state.dtype)
    return output.reshape(x.x.shape).to(x.x.dtype), final, _nothing(x.x)


def _log_scan(*args: Any) -> tuple[Tensor, ...]:
    """The scan in the log domain; its state is float64."""
    x = Scan._make(args)
    state = x.x.new_full(x.x.shape[:1] + x.x.shape[2:], -torch.inf, dtype=torch.float64)
    state = state if x.initial_state is None else x.initial_state.double()
    inputs = [x.x.double(), x.log_decay.double()]
    output, final = _loop("LogScan", state, [], inputs, inputs[0])
    return output.to(x.x.dtype), final, _nothing(x.x)


def _selective_scan(*args: Any) -> tuple[Tensor, ...]:
    """Channels as heads of K x 1, which share keys and queries."""
    x = Selective._make(args)
    channels = x.x.shape[2]
    q, k = (y[:, :, None].expand(-1, -1, channels, -1) for y in (x.q, x.k))
    log_decay = x.step[..., None] * x.rate.T
    state = None if x.initial_state is None else x.initial_state.transpose(1, 2)[..., None]
    output, final = _linear_attention(q, k, x.x[..., None], state, log_decay)
    return output[..., 0].to(x.x.dtype), final[..., 0].transpose(1, 2), _nothing(x.x)


def _diagonal_scan(*args: Any) -> tuple[Tensor, ...]:
    """Complex states, as pairs of real numbers."""
    x = Diagonal._make(args)
    size = x.log_decay.double().exp()
    angle = x.angle.double()
    constants = [(size * angle.cos()).float(), (size * angle.sin()).float(), *x.weight.float().unbind(-1)]
    state = x.initial_state
    if state is None:
        state = x.x.new_zeros(x.x.shape[0], *x.log_decay.shape, 2)
    output, final = _loop("DiagonalScan", state, constants, [x.x.float()], x.x)
    return output, final, _nothing(x.x)


def _long_convolution(*args: Any) -> Tensor:
    """A convolution of the inputs so far with filters as long, of which only the last T outputs are computed."""
    x = LONG_CONVOLUTION.inputs._make(args)
    past = x.x if x.past is None else torch.cat((x.past.to(x.x.dtype), x.x), dim=1)
    length = x.x.shape[1]
    inputs = F.pad(past.transpose(1, 2), (length - 1, 0))
    taps = x.filters[:, : past.shape[1]].to(inputs.dtype).flip(1)
    return F.conv1d(inputs, taps[:, None], groups=taps.shape[0]).transpose(1, 2)


def _ridge_solve(*args: Any) -> Tensor:
    """Conjugate gradients, in which a product with G_t is linear attention to the keys."""
    x = System._make(args)

    def times(y: Tensor) -> Tensor:
        product, _ = _linear_attention(y, x.beta[..., None] * x.k, x.k, x.initial_state, x.log_decay)
        return product + x.ridge * y

    return conjugate_gradients(times, x.b, x.iterations)


def _grouped_linear(*args: Any) -> Tensor:
    """Rows sorted by expert, each multiplied with its expert's matrix."""
    x = GROUPED_LINEAR.inputs._make(args)
    matrices = x.weight.unbind()
    return torch.onnx.ops.symbolic(
        f"{LOOPS}::GroupedLinear{len(matrices)}",
        [x.x, x.ends, *matrices],
        dtype=x.x.dtype,
        shape=(x.x.shape[0], x.weight.shape[2]),
        version=1,
    )


def _nothing(like: Tensor) -> Tensor:
    """Return what an op saves for its backward pass: nothing."""
    return like.new_empty(0)


def _log1p(x: Tensor) -> Tensor:
    """Return log(1 + x), to all digits for small x too: the rounding of 1 + x cancels in log(u) / (u - 1)."""
    u = 1 + x
    return torch.where(u == 1, x, u.log() * x / (u - 1))


def _expm1(x: Tensor) -> Tensor:
    """Return exp(x) - 1, to all digits for small x too."""
    return (x / 2).tanh() * (x.exp() + 1)


def _softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x))."""
    return x.clamp(min=0) + _log1p((-x.abs()).exp())


def _logsigmoid(x: Tensor) -> Tensor:
    """Return log sigmoid(x): the exporter's Log(Sigmoid(x)) is -inf from x = -104 on."""
    return -_softplus(-x)


def _logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """Return log(exp(x) + exp(y)) of finite x or y."""
    return torch.maximum(x, y) + _log1p((-(x - y).abs()).exp())


LOWERINGS: Mapping[Any, Callable[..., Any]] = {
    **dict(zip(RECURRENCES, (_recurrence, _recurrence, _dplr), strict=True)),
    SCAN.op: _scan,
    LOG_SCAN.op: _log_scan,
    SELECTIVE.op: _selective_scan,
    DIAGONAL.op: _diagonal_scan,
    LONG_CONVOLUTION.op: _long_convolution,
    GROUPED_LINEAR.op: _grouped_linear,
    RIDGE_SOLVE.op: _ridge_solve,
    torch.log1p: _log1p,
    torch.expm1: _expm1,
    F.softplus: _softplus,
    F.logsigmoid: _logsigmoid,
    torch.logaddexp: _logaddexp,
}
"""Function that computes an op in an exported graph, by the op: custom ops, and those that lose digits in ONNX."""


class Lowering(TorchFunctionMode):
    """Mode in which `LOWERINGS` compute their ops, while an exporter records a forward pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return LOWERINGS.get(func, func)(*args, **(kwargs or {}))
