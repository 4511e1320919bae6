"""Cases of the scan family, with their definitions in float64 (notation: ops/scan/api.py).

The channels of a case are its heads and its value width, C = H V, and its key width is K.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from ...ops.runtime.kernel import Probe
from ...ops.scan.elementwise import Scan
from .case import Drawn, KernelCase, Tensors
from .fixed import FIXED, SLOW
from .layout import spread


@dataclass(frozen=True, kw_only=True, repr=False)
class ScanCase(KernelCase):
    """One call of a kernel of `scan`."""

    strength: float = 1.0
    """Standard deviation of the normal numbers x in the log-decays, -|x| - weakest."""
    weakest: float = 0.0
    """Amount by which all log-decays are lowered: none is above -weakest."""
    resets: tuple[int, ...] = ()
    """Indices of the tokens whose log-decay is -inf."""

    decays = ("B T H V",)
    fixed = (*FIXED, {**SLOW, "log_decay": "B T H V", "strength": 0.01})
    axes: ClassVar[Mapping[str, str]] = {"output": "BTHV", "x": "BTHV", "state": "NHV"}
    state = ("state",)
    adds_up = True
    names: ClassVar[tuple[str, ...]] = ("x",)
    """Inputs other than log-decays and states."""

    @classmethod
    def leaves_of_probe(cls, probe: Probe) -> list[str]:
        return [*cls.names, "log_decay", *(cls.state if probe.initial_state else ())]

    @classmethod
    def details(cls, drawn: Drawn) -> dict[str, Any]:
        draw, probe, common, heads = drawn
        length = sum(common["lengths"]) if probe.packed else common["lengths"][0]
        some = st.lists(st.integers(0, length - 1), max_size=3).map(tuple)
        return {
            "n_heads": draw(heads),
            "strength": draw(st.sampled_from([1.0, 0.0, 0.01, 0.3, 5.0])),
            "weakest": draw(st.sampled_from([0.0, 0.0, 0.0, 9.0])),
            "resets": draw(st.just(()) | some | some | st.just(tuple(range(length)))),
        }

    def dtype_of(self, name: str) -> torch.dtype:
        return self.wide if name in ("log_decay", "state") else self.dtype

    @property
    def sizes_of_axes(self) -> dict[str, int]:
        """Size of each dimension, by its letter."""
        heads, width = self.n_heads, self.value_width
        sizes = {"B": self.rows, "T": self.length, "N": len(self.lengths), "K": self.key_width}
        return sizes | {"H": heads, "V": width, "C": heads * width, "2": 2}

    def random(self, name: str, randn: Callable[..., Tensor]) -> Tensor:
        """Return random numbers in the shape of an input."""
        return randn(*(self.sizes_of_axes[axis] for axis in self.axes_of(name)))

    def inputs(self, device: torch.device) -> Tensors:
        randn = self.randn()
        # the mean is 1, so that a kernel that loses terms becomes visible
        values = {name: 1 + self.random(name, randn) for name in self.names}
        values["log_decay"] = -self.strength * self.random("log_decay", randn).abs() - self.weakest
        values["log_decay"].transpose(0, 1)[list(self.resets)] = -math.inf
        if self.initial_state:
            values["state"] = self.random("state", randn)
        return {name: self.laid_out(name, x.to(device, self.dtype_of(name))) for name, x in values.items()}

    def call(self, inputs: Tensors) -> Any:
        return Scan(inputs["x"], inputs["log_decay"], *self.options(inputs))

    def options(self, inputs: Tensors) -> tuple[Any, ...]:
        """Return the fields that the inputs of all scans have."""
        boundaries = self.cu_seqlens(inputs)
        return inputs.get("state"), boundaries, None, self.chunk_size, self.final_state, self.chunk_size == 1

    def cu_seqlens(self, inputs: Tensors) -> Tensor | None:
        if not self.packed:
            return None
        device = inputs["x"].device
        boundaries = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=self.cu_seqlens_dtype, device=device)
        return spread(boundaries) if self.layout in ("mixed", "sliced") else boundaries

    def define(self, inputs: Tensors) -> Tensors:
        """Compute h_t = exp(a_t) h_{t-1} + x_t, token by token."""
        return self.recurrence(inputs, lambda h, x, log_decay: (log_decay.exp() * h + x,) * 2)

    def recurrence(self, inputs: Tensors, step: Callable[..., tuple[Tensor, Tensor]], empty: float = 0) -> Tensors:
        """Return output and final state; `step(h, *tokens)` returns the state after a token and the token's output.

        `tokens` are the token's values of the inputs with a time dimension, in their order. `empty` is the state before
        the first token.
        """
        per_token = [name for name in inputs if self.axes_of(name)[:2] == "BT"]
        rows = [self.sequences(inputs[name]) for name in per_token]
        outputs, final = [], []
        for n in range(len(self.lengths)):
            shape = [self.sizes_of_axes[axis] for axis in self.axes["state"][1:]]
            h = inputs["state"][n] if "state" in inputs else inputs["x"].new_full(shape, empty)
            results = []
            for tokens in zip(*(row[n].unbind() for row in rows), strict=True):
                h, output = step(h, *tokens)
                results.append(output)
            outputs.append(torch.stack(results) if results else rows[0][n])
            final.append(h)
        results = {"output": self.segment(outputs)}
        return results | ({"state": torch.stack(final)} if self.final_state else {})

    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        del inputs
        return self.define(absolute)  # every term is a product of inputs and decays, so absolute inputs suffice
