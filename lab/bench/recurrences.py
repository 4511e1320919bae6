"""The recurrence benchmark: each op family's chunkwise form against a loop over tokens, forward and backward."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.decay import decay
from ...ops.delta import delta
from ...ops.dplr import dplr
from ...ops.scan import scan, selective_scan
from .benchmark import Benchmark, Implementation, PreparedCall, Settings
from .timing import TimedCall

HEADS = 4
KEYS = 64
VALUES = 64
CHANNELS = 256
STATE = 16
CHUNKWISE = "chunkwise"
LOOP = "loop"

Inputs = dict[str, Tensor]
Normal = Callable[..., Tensor]
"""Function of the sizes `*shape` that draws normal numbers [B T *shape]."""
Map = Callable[[Inputs], Tensor]


class Case(NamedTuple):
    """A recurrence: its inputs, its chunkwise form and its loop over tokens."""

    inputs: Callable[[Normal], Inputs]
    chunkwise: Map
    loop: Map
    output: tuple[int, ...]
    """Shape of the output per token."""


@dataclass
class Recurrence(Implementation):
    """Implementation that times one form of a recurrence, forward and backward."""

    name: str
    settings: Settings
    function: Map
    case: Case

    def unavailable_reason(self) -> str | None:
        return None

    def prepared_call(self, length: int) -> PreparedCall:
        batch = self.settings.batch
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            x = torch.randn(batch, length, *shape, generator=generator)
            return x.to(self.settings.device, self.settings.dtype)

        inputs = {name: x.detach().requires_grad_() for name, x in self.case.inputs(normal).items()}
        upstream = normal(*self.case.output)

        def run() -> None:
            torch.autograd.grad(self.function(inputs), list(inputs.values()), upstream)

        return PreparedCall(call=TimedCall(run), tokens=batch * length, record=run if self.name == CHUNKWISE else None)


class RecurrenceBenchmark(Benchmark):
    """Benchmark of chunkwise ops against loops over tokens."""

    name = "recurrence"
    title = "Recurrences, without weights"
    order = 1

    def parts(self) -> dict[str, list[Implementation]]:
        return {
            name: [
                Recurrence(CHUNKWISE, self.settings, case.chunkwise, case),
                Recurrence(LOOP, self.settings, case.loop, case),
            ]
            for name, case in CASES.items()
        }

    def notes(self) -> Iterable[str]:
        yield (
            f"Forward and backward, {self.settings.batch} sequence(s). Matrix states: {HEADS} heads of {KEYS} x "
            f"{VALUES}, chunks of 64 tokens. Scans: {CHANNELS} channels; the selective scan has {STATE} states per "
            "channel."
        )
        yield (
            "The loop computes the recurrence in torch, token by token, with autograd's gradients. The share is the "
            "time of the chunkwise form's matrix products alone divided by its time."
        )


def _matrix_inputs(normal: Normal, decay: tuple[int, ...] = (), *extra: str) -> Inputs:
    """Draw queries, keys of norm 1 and values; log-decays of shape `decay`, if any; and the named extra inputs."""
    k = F.normalize(normal(HEADS, KEYS), dim=-1)
    inputs = {"q": normal(HEADS, KEYS), "k": k, "v": normal(HEADS, VALUES)}
    inputs |= {"log_decay": -normal(*decay).abs() / 16} if decay else {}
    beta = normal(HEADS).sigmoid()
    extras = {"beta": beta, "a": k, "b": -beta[..., None] * k}
    return inputs | {name: extras[name] for name in extra}


def _selective_inputs(normal: Normal) -> Inputs:
    rate = -normal(STATE, CHANNELS)[0, 0].abs()
    step = F.softplus(normal(CHANNELS) - 4)
    return {"x": normal(CHANNELS), "step": step, "rate": rate, "k": normal(STATE), "q": normal(STATE)}


def _matrix_loop(x: Inputs) -> Tensor:
    """Compute S_t = (I + b_t a_t^T) diag(exp(g_t)) S_{t-1} + k_t v_t^T and o_t = q_t S_t / sqrt(K) by a loop."""
    q, k, v = (x[name] for name in "qkv")
    a, b, g = x.get("a"), x.get("b"), x.get("log_decay")
    if (beta := x.get("beta")) is not None:
        a, b, v = k, -beta[..., None] * k, beta[..., None] * v
    decay = None if g is None else (g if g.ndim == 4 else g[..., None]).exp()[..., None].unbind(1)
    state = q.new_zeros(len(q), HEADS, KEYS, VALUES)
    outputs = []
    for t in range(q.shape[1]):
        state = state if decay is None else decay[t] * state
        if a is not None and b is not None:
            state = state + b[:, t, :, :, None] * (a[:, t, :, None] @ state)
        state = state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(KEYS**-0.5 * (q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(outputs, dim=1)


def _scan_loop(x: Inputs) -> Tensor:
    """Compute h_t = exp(g_t) h_{t-1} + x_t by a loop."""
    state = torch.zeros_like(x["x"][:, 0])
    outputs = []
    for factor, written in zip(x["log_decay"].exp().unbind(1), x["x"].unbind(1), strict=True):
        state = factor * state + written
        outputs.append(state)
    return torch.stack(outputs, dim=1)


def _selective_loop(x: Inputs) -> Tensor:
    """Compute h_t = exp(step_t rate) h_{t-1} + k_t x_t^T and o_t = q_t h_t by a loop."""
    state = x["x"].new_zeros(len(x["x"]), STATE, CHANNELS)
    outputs = []
    for u, step, k, q in zip(*(x[name].unbind(1) for name in ("x", "step", "k", "q")), strict=True):
        state = (step[:, None] * x["rate"]).exp() * state + k[:, :, None] * u[:, None]
        outputs.append((q[:, None] @ state)[:, 0])
    return torch.stack(outputs, dim=1)


def _matrix(op: Callable[..., Any], *decay: int, extra: tuple[str, ...] = ()) -> Case:
    """Return the case of an op that has a matrix state and takes its inputs by keyword.

    `decay` is the shape of a token's log-decays, empty for none; `extra` are names of further inputs.
    """
    return Case(
        lambda normal: _matrix_inputs(normal, decay, *extra),
        lambda x: op(**x)[0],
        _matrix_loop,
        (HEADS, VALUES),
    )


CASES = {
    "decay": _matrix(decay, HEADS),
    "decay per key": _matrix(decay, HEADS, KEYS),
    "delta": _matrix(delta, extra=("beta",)),
    "gated delta": _matrix(delta, HEADS, extra=("beta",)),
    "delta with decays per key": _matrix(delta, HEADS, KEYS, extra=("beta",)),
    "diagonal plus rank one": _matrix(dplr, HEADS, KEYS, extra=("a", "b")),
    "scan": Case(
        lambda normal: {"x": normal(CHANNELS), "log_decay": -normal(CHANNELS).abs() / 16},
        lambda x: scan(**x)[0],
        _scan_loop,
        (CHANNELS,),
    ),
    "selective scan": Case(_selective_inputs, lambda x: selective_scan(**x)[0], _selective_loop, (CHANNELS,)),
}
"""Recurrences that are measured, by name."""
