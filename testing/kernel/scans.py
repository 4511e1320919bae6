"""Cases of scans and of the short convolution, with their definitions in float64 (notation: ops/scan/api.py).

The channels of a case are its heads and its value width, C = H V, and its key width is K.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from ...ops.convolution.short import ShortConvolutionInputs
from ...ops.runtime.kernel import Kernel, Probe
from ...ops.runtime.packing import Documents
from ...ops.scan.api import require_floats
from ...ops.scan.diagonal import Diagonal
from ...ops.scan.elementwise import Scan
from ...ops.scan.logarithmic import LOG_STATE
from ...ops.scan.selective import Selective
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
    state_is_sum = True
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
        return self.wide_dtype if name in ("log_decay", "state") else self.dtype

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

    def run(self, kernel: Kernel, inputs: Tensors) -> Tensors:
        require_floats(*inputs.values())
        return super().run(kernel, inputs)

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


@dataclass(frozen=True, kw_only=True, repr=False)
class SelectiveCase(ScanCase):
    """One call of a kernel of `selective_scan`; its log-decays are -steps times -rates."""

    decays = (None,)
    fixed = (*FIXED, {**SLOW, "log_decay": None, "strength": 0.01})
    names = ("x", "step", "rate", "k", "q")
    axes: ClassVar[Mapping[str, str]] = {
        "output": "BTC",
        "x": "BTC",
        "step": "BTC",
        "rate": "KC",
        "k": "BTK",
        "q": "BTK",
        "state": "NKC",
    }

    @classmethod
    def leaves_of_probe(cls, probe: Probe) -> list[str]:
        return [*cls.names, *(cls.state if probe.initial_state else ())]

    def dtype_of(self, name: str) -> torch.dtype:
        return self.wide_dtype if name in ("step", "rate") else super().dtype_of(name)

    def inputs(self, device: torch.device) -> Tensors:
        randn = self.randn()
        values = {name: 1 + self.random(name, randn) for name in self.names}
        values["step"] = self.random("step", randn).abs() + self.weakest
        values["rate"] = -self.strength * self.random("rate", randn).abs()
        if self.initial_state:
            values["state"] = self.random("state", randn)
        return {name: self.laid_out(name, x.to(device, self.dtype_of(name))) for name, x in values.items()}

    def call(self, inputs: Tensors) -> Selective:
        x, step, rate, k, q = (inputs[name] for name in self.names)
        return Selective(x, step, rate, k, q, *self.options(inputs))

    def define(self, inputs: Tensors) -> Tensors:
        """Compute h_t = exp(step_t rate) h_{t-1} + k_t x_t^T and o_t = q_t h_t, token by token."""
        return self.selective(inputs, lambda step: step * inputs["rate"])

    def selective(self, inputs: Tensors, log_decay: Callable[[Tensor], Tensor]) -> Tensors:
        """Return output and final state; `log_decay(step)` returns the log-decays of a token, [K C]."""

        def step(h: Tensor, x: Tensor, step: Tensor, k: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
            h = log_decay(step).exp() * h + k[:, None] * x
            return h, q @ h

        return self.recurrence(inputs, step)

    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        del inputs

        def log_decay(step: Tensor) -> Tensor:
            size = step * absolute["rate"]
            return size - 2 * size.detach()  # decays as they are, with gradients that are all positive

        return self.selective(absolute, log_decay)


@dataclass(frozen=True, kw_only=True, repr=False)
class LogScanCase(ScanCase):
    """One call of a kernel of `log_scan`. An empty state is the logarithm of 0: -inf is compared as a finite number."""

    log_of_zero: ClassVar[float] = -(2.0**100)
    """Finite number that stands for -inf."""
    state_is_sum = False  # a logarithm in 16 bits is not exact enough to be added to for long

    def dtype_of(self, name: str) -> torch.dtype:
        return LOG_STATE if name == "state" else super().dtype_of(name)

    def run(self, kernel: Kernel, inputs: Tensors) -> Tensors:
        return {name: x.nan_to_num(neginf=self.log_of_zero) for name, x in super().run(kernel, inputs).items()}

    def define(self, inputs: Tensors) -> Tensors:
        """Compute h_t = log(exp(a_t + h_{t-1}) + exp(x_t)), token by token."""

        def step(h: Tensor, x: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.logaddexp(log_decay + h, x)
            return h, h

        return self.recurrence(inputs, step, empty=self.log_of_zero)

    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        """Return error scales, the same for all elements: 1 plus the sizes of the largest numbers of each tensor.

        An absolute error of a logarithm is a relative error of its exponential, and of the derivatives, which are
        ratios of exponentials.
        """
        signed = {name: y + (inputs[name] - y).detach() if name != "log_decay" else y for name, y in absolute.items()}
        outputs = self.define(signed)
        numbers = [x.detach()[x > self.log_of_zero / 2] for x in (*inputs.values(), *outputs.values())]
        size = 1 + sum(x.abs().max() for x in numbers if len(x))
        return {name: size * (1 + x - x.detach()) for name, x in outputs.items()}


@dataclass(frozen=True, kw_only=True, repr=False)
class DiagonalCase(ScanCase):
    """One call of a kernel of `diagonal_scan`; its decays are fixed."""

    decays = ("K C",)
    fixed = (*FIXED, {**SLOW, "log_decay": "K C", "strength": 0.01})
    names = ("x", "angle", "weight")
    axes: ClassVar[Mapping[str, str]] = {
        "output": "BTC",
        "x": "BTC",
        "angle": "KC",
        "weight": "KC2",
        "state": "NKC2",
    }

    @classmethod
    def details(cls, drawn: Drawn) -> dict[str, Any]:
        return super().details(drawn) | {"resets": ()}

    def dtype_of(self, name: str) -> torch.dtype:
        return self.wide_dtype if name in ("angle", "weight") else super().dtype_of(name)

    def call(self, inputs: Tensors) -> Diagonal:
        x, angle, weight = (inputs[name] for name in self.names)
        return Diagonal(x, inputs["log_decay"], angle, weight, *self.options(inputs))

    def define(self, inputs: Tensors) -> Tensors:
        """Compute h_t = exp(a + i angle) h_{t-1} + x_t and o_t = Re(sum_k w h_t), token by token."""
        decay, angle = inputs["log_decay"].exp(), inputs["angle"]
        weight = inputs["weight"]

        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            real, imaginary = h.unbind(-1)
            cos, sin = decay * angle.cos(), decay * angle.sin()
            h = torch.stack((cos * real - sin * imaginary + x, cos * imaginary + sin * real), dim=-1)
            return h, (weight[..., 0] * h[..., 0] - weight[..., 1] * h[..., 1]).sum(0)

        return self.recurrence(inputs, step)

    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        """Return sums of absolute values: a rotation adds multiples of a number's real and imaginary part."""
        del inputs
        decay, angle = absolute["log_decay"].exp(), absolute["angle"]
        turn = 1 + (angle - angle.detach())  # 1 for cosine and sine, and for their derivatives

        def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            size = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
            h = (decay * turn)[..., None] * size + torch.stack((x.expand_as(decay),) * 2, dim=-1)
            return h, (absolute["weight"] * h).sum((0, -1))

        return self.recurrence(absolute, step)


@dataclass(frozen=True, kw_only=True, repr=False)
class ConvolutionCase(ScanCase):
    """One call of a kernel of `short_convolution`, whose filters are as wide as the case's keys."""

    has_bias: bool = True
    """True if the call has a bias."""
    silu: bool = False
    """True if a SiLU follows the convolution."""

    decays = (None,)
    fixed = FIXED
    names = ("x", "weight", "bias")
    axes: ClassVar[Mapping[str, str]] = {"output": "BTC", "x": "BTC", "weight": "CK", "bias": "C", "state": "NPC"}
    state_is_sum = False

    @property
    def sizes_of_axes(self) -> dict[str, int]:
        return super().sizes_of_axes | {"P": self.key_width - 1}

    @classmethod
    def leaves_of_probe(cls, probe: Probe) -> list[str]:
        return [*cls.names, *(cls.state if probe.initial_state else ())]

    @classmethod
    def details(cls, drawn: Drawn) -> dict[str, Any]:
        draw, heads = drawn.draw, drawn.heads
        grad = drawn.common["grad"]
        fields = {"n_heads": draw(heads), "silu": draw(st.booleans()), "has_bias": draw(st.booleans())}
        kept = tuple(name for name in grad if name != "bias" or fields["has_bias"])
        # if only the bias has a gradient, keep it: the probe asks for a case with gradients
        return fields | ({"grad": kept} if kept or not grad else {"has_bias": True})

    def dtype_of(self, name: str) -> torch.dtype:
        del name
        return self.dtype

    def inputs(self, device: torch.device) -> Tensors:
        randn = self.randn()
        names = [name for name in self.names if name != "bias" or self.has_bias]
        values = {name: self.random(name, randn) for name in (*names, *(self.state if self.initial_state else ()))}
        return {name: self.laid_out(name, x.to(device, self.dtype)) for name, x in values.items()}

    def call(self, inputs: Tensors) -> ShortConvolutionInputs:
        documents = Documents.of(self.cu_seqlens(inputs), self.length)
        x, weight, bias, state = (inputs.get(name) for name in (*self.names, "state"))
        assert x is not None
        assert weight is not None
        return ShortConvolutionInputs(x, weight, bias, state, documents, self.final_state, self.silu)

    def define(self, inputs: Tensors) -> Tensors:
        """Compute y_t = b + sum_{i<W} w[:, W-1-i] x_{t-i}, followed by silu if the case has it, token by token."""
        return self.convolved(inputs, F.silu)

    def convolved(self, inputs: Tensors, activation: Callable[[Tensor], Tensor]) -> Tensors:
        """Return output and final state, with `activation` in place of silu."""
        weight, bias = inputs["weight"], inputs.get("bias", 0)

        def step(past: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            window = torch.cat((past, x[None]))
            y = (window * weight.T).sum(0) + bias
            return window[1:], activation(y) if self.silu else y

        return self.recurrence(inputs, step)

    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        del inputs
        return self.convolved(absolute, lambda y: 1.1 * y)  # silu's slope is at most 1.1
