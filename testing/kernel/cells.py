"""Cases of the cells of sLSTM and M2RNN, with their definitions in float64 (notation: ops/cell/api.py).

The error scale of a gradient is the sum of the absolute values of all paths through the tokens: a second pass of the
recurrence adds up, next to the values, how much each of them changes with the inputs (the names begin with d_).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from ...ops.cell.api import require_floats
from ...ops.cell.m2rnn import M2RNN
from ...ops.cell.slstm import SLSTM
from ...ops.runtime.kernel import Kernel, Probe
from ...ops.scan import LOG_STATE
from .case import SEGMENT, Drawn, KernelCase, Tensors
from .fixed import FIXED, RESETS, STATES
from .scans import ScanCase

LOG_OF_ZERO = -(2.0**100)
"""Finite number that stands for the logarithm of 0."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SLSTMCase(ScanCase):
    """One call of a kernel of `slstm`, whose heads have as many channels as the case's value width."""

    exponential: bool = False
    """True if the forget gate is exp(f)."""

    decays = (None,)
    fixed = FIXED
    names = ("gates", "recurrent")
    axes: ClassVar[Mapping[str, str]] = {
        "output": "BTHV",
        "gates": "BTHL",
        "recurrent": "HVL",
        "memory": "NH2V",
        "weight": "NHV",
    }
    state = ("memory", "weight")
    state_is_sum = False

    @property
    def sizes_of_axes(self) -> dict[str, int]:
        return super().sizes_of_axes | {"L": 4 * self.value_width}

    @classmethod
    def leaves_of_probe(cls, probe: Probe) -> list[str]:
        return [*cls.names, *(cls.state if probe.initial_state else ())]

    @classmethod
    def details(cls, drawn: Drawn) -> dict[str, Any]:
        return {"n_heads": drawn.draw(drawn.heads), "exponential": drawn.draw(st.booleans())}

    def dtype_of(self, name: str) -> torch.dtype:
        return {"memory": self.wide_dtype, "weight": LOG_STATE}.get(name, self.dtype)

    def inputs(self, device: torch.device) -> Tensors:
        randn = self.randn()
        values = {name: self.random(name, randn) for name in self.names}
        values["recurrent"] = values["recurrent"] / self.value_width
        if self.initial_state:
            values |= {name: self.random(name, randn) for name in self.state}
        return {name: self.laid_out(name, x.to(device, self.dtype_of(name))) for name, x in values.items()}

    def cu_seqlens(self, inputs: Tensors) -> Tensor | None:
        return super().cu_seqlens({"x": inputs["gates"]})

    def call(self, inputs: Tensors) -> SLSTM:
        gates, recurrent, memory, weight = (inputs.get(name) for name in (*self.names, *self.state))
        assert gates is not None
        assert recurrent is not None
        boundaries = self.cu_seqlens(inputs)
        return SLSTM(gates, recurrent, memory, weight, boundaries, None, self.exponential, self.final_state)

    def run(self, kernel: Kernel, inputs: Tensors) -> Tensors:
        require_floats(*inputs.values())
        return KernelCase.run(self, kernel, inputs)

    def leaves_of(self, state: Any) -> Tensors:
        memory, weight = state
        return {"memory": memory, "weight": weight.nan_to_num(neginf=LOG_OF_ZERO)}

    def define(self, inputs: Tensors) -> Tensors:
        """Compute the cell token by token."""
        return self.cell(inputs)

    def cell(self, inputs: Tensors, absolute: Tensors | None = None) -> Tensors:
        """Return output and final state; with `absolute` inputs, their changes along all paths in place of them."""
        changes = {} if absolute is None else {name: x - x.detach() for name, x in absolute.items()}
        width = self.value_width
        outputs: list[Tensor] = []
        final: dict[str, list[Tensor]] = {"memory": [], "weight": []}
        rows = [self.sequences(x["gates"]) if x else None for x in (inputs, changes)]
        for n in range(len(self.lengths)):
            gates = rows[0][n]  # type: ignore[index]
            zeros = gates.new_zeros(self.n_heads, width)
            h, a = inputs["memory"][n].unbind(1) if "memory" in inputs else (zeros, zeros)
            log_sum = inputs["weight"][n] if "weight" in inputs else zeros + LOG_OF_ZERO
            d_h, d_a = changes["memory"][n].unbind(1) if "memory" in changes else (zeros, zeros)
            d_l = changes["weight"][n] if "weight" in changes else zeros
            results = [zeros[None][:0]]
            for t in range(len(gates)):
                logits = gates[t] + torch.einsum("hd,hde->he", h, inputs["recurrent"])
                i, f, z, o = logits.unflatten(-1, (4, width)).unbind(-2)
                old = (f if self.exponential else F.logsigmoid(f)) + log_sum
                share, opened, value = (i - old).sigmoid(), o.sigmoid(), z.tanh()
                before, before_h = a, h
                log_sum = torch.logaddexp(old, i)
                a = (1 - share) * a + share * value
                h = opened * a
                if rows[1] is not None:
                    d_logits = (
                        rows[1][n][t]
                        + torch.einsum("hd,hde->he", d_h, inputs["recurrent"].abs())
                        + torch.einsum("hd,hde->he", before_h.abs(), changes["recurrent"])
                    )
                    d_i, d_f, d_z, d_o = d_logits.unflatten(-1, (4, width)).unbind(-2)
                    d_old = (d_f if self.exponential else (-f).sigmoid() * d_f) + d_l
                    d_a = (
                        (1 - share) * d_a
                        + share * (1 - value.square()) * d_z
                        + (value - before).abs() * share * (1 - share) * (d_i + d_old)
                    )
                    d_l = share * d_i + (1 - share) * d_old
                    d_h = opened * d_a + (a * opened * (1 - opened)).abs() * d_o
                results.append((h if absolute is None else d_h)[None])
            outputs.append(torch.cat(results))
            memory, weight = ((h, a), log_sum) if absolute is None else ((d_h, d_a), d_l)
            final["memory"].append(torch.stack(memory, dim=1))
            final["weight"].append(weight)
        results_by_name = {"output": self.segment(outputs)}
        return results_by_name | ({k: torch.stack(x) for k, x in final.items()} if self.final_state else {})

    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        return _scaled(self, inputs, self.cell(inputs, absolute))


@dataclass(frozen=True, kw_only=True, repr=False)
class M2RNNCase(ScanCase):
    """One call of a kernel of `m2rnn`."""

    decays = ("B T H",)
    fixed = (*FIXED, *(case for case in (*STATES, *RESETS) if case.get("log_decay") == "B T H"))
    names = ("q", "k", "v", "weight")
    axes: ClassVar[Mapping[str, str]] = {**SEGMENT, "weight": "HVV", "state": "NHKV"}
    state_is_sum = False

    def dtype_of(self, name: str) -> torch.dtype:
        return self.wide_dtype if name in ("log_decay", "state", "weight") else self.dtype

    def inputs(self, device: torch.device) -> Tensors:
        randn = self.randn()
        values = {name: self.random(name, randn) for name in self.names}
        values["weight"] = values["weight"] / self.value_width
        values["log_decay"] = -self.strength * self.random("log_decay", randn).abs() - self.weakest
        values["log_decay"].transpose(0, 1)[list(self.resets)] = -torch.inf
        if self.initial_state:
            values["state"] = self.random("state", randn)
        return {name: self.laid_out(name, x.to(device, self.dtype_of(name))) for name, x in values.items()}

    def cu_seqlens(self, inputs: Tensors) -> Tensor | None:
        return super().cu_seqlens({"x": inputs["v"]})

    def call(self, inputs: Tensors) -> M2RNN:
        q, k, v, weight = (inputs[name] for name in self.names)
        initial, boundaries = inputs.get("state"), self.cu_seqlens(inputs)
        return M2RNN(q, k, v, inputs["log_decay"], weight, initial, boundaries, None, self.chunk_size, self.final_state)

    def run(self, kernel: Kernel, inputs: Tensors) -> Tensors:
        require_floats(*inputs.values())
        return KernelCase.run(self, kernel, inputs)

    def define(self, inputs: Tensors) -> Tensors:
        """Compute the cell token by token."""
        return self.cell(inputs)

    def cell(self, inputs: Tensors, absolute: Tensors | None = None) -> Tensors:
        """Return output and final state; with `absolute` inputs, their changes along all paths in place of them."""
        changes = {} if absolute is None else {name: x - x.detach() for name, x in absolute.items()}
        per_token = ("q", "k", "v", "log_decay")
        rows = {name: self.sequences(inputs[name]) for name in per_token}
        d_rows = {name: self.sequences(changes[name]) for name in per_token} if changes else {}
        outputs, final = [], []
        for n in range(len(self.lengths)):
            like = inputs["q"].new_zeros(self.n_heads, self.key_width, self.value_width)
            state, d_state = inputs["state"][n] if "state" in inputs else like, like
            if "state" in changes:
                d_state = changes["state"][n]
            results = [like[None, :, 0][:0]]
            for t in range(len(rows["v"][n])):
                q, k, v, log_decay = (rows[name][n][t] for name in per_token)
                decay = log_decay.exp()[:, None, None]
                candidate = (state @ inputs["weight"] + k[:, :, None] * v[:, None]).tanh()
                before, state = state, decay * state + (1 - decay) * candidate
                if changes:
                    d_q, d_k, d_v, d_decay = (d_rows[name][n][t] for name in per_token)
                    d_product = (
                        d_state @ inputs["weight"].abs()
                        + before.abs() @ changes["weight"]
                        + d_k[:, :, None] * v.abs()[:, None]
                        + k.abs()[:, :, None] * d_v[:, None]
                    )
                    d_state = (
                        decay * d_state
                        + (1 - decay) * (1 - candidate.square()) * d_product
                        + (before - candidate).abs() * decay * d_decay.nan_to_num()[:, None, None]
                    )
                    changed = torch.einsum("hk,hkv->hv", q.abs(), d_state)
                    results.append((changed + torch.einsum("hk,hkv->hv", d_q, state.abs()))[None])
                else:
                    results.append(torch.einsum("hk,hkv->hv", q, state)[None])
            outputs.append(torch.cat(results))
            final.append(d_state if changes else state)
        named = {"output": self.segment(outputs)}
        return named | ({"state": torch.stack(final)} if self.final_state else {})

    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        return _scaled(self, inputs, self.cell(inputs, absolute))


def _scaled(case: KernelCase, inputs: Tensors, changes: Tensors) -> Tensors:
    """Return error scales: 1 plus the size of the outputs, with the gradients of `changes`, times their sizes."""
    outputs = case.define({name: x.detach() for name, x in inputs.items()})
    scales = {}
    for name, x in outputs.items():
        finite = x[x > LOG_OF_ZERO / 2]
        size = 1 + (finite.abs().max() if finite.numel() else 0)
        scales[name] = size * (1 + changes[name])
    return scales
