"""Cases of ops without kernels of their own: the delta rule with several steps per token, and the long convolution."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.runtime.kernel import Kernel
from ..kernel.case import Tensors
from ..kernel.families import DeltaCase
from ..kernel.scans import ConvolutionCase


@dataclass(frozen=True, kw_only=True, repr=False)
class DeltaProductCase(DeltaCase):
    """One call of `delta_product`, with log-decays per token: a delta rule on `steps` steps for each token."""

    steps: int = 2
    """Number of keys, values and betas per token, n."""

    axes: ClassVar[Mapping[str, str]] = {**DeltaCase.axes, "k": "BSHK", "v": "BSHV", "beta": "BSH"}

    @property
    def by_step(self) -> DeltaCase:
        """The delta rule whose tokens are the steps."""
        common: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(DeltaCase)}
        common["lengths"] = tuple(self.steps * length for length in self.lengths)
        common["resets"] = tuple(self.steps * token for token in self.resets)
        return DeltaCase(**common)

    def inputs(self, device: torch.device) -> Tensors:
        inputs = self.by_step.inputs(device)
        last, first = inputs["q"][:, self.steps - 1 :: self.steps], inputs["log_decay"][:, :: self.steps]
        return inputs | {"q": last.contiguous(), "log_decay": first.contiguous()}

    def define(self, inputs: Tensors) -> Tensors:
        """Compute the delta rule of the steps: the first one of a token decays the state, its query reads the last."""
        return self._of_tokens(self.by_step.define(self._of_steps(inputs)))

    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        return self._of_tokens(self.by_step.terms(self._of_steps(inputs), self._of_steps(absolute)))

    def cancelled(self, kernel: Kernel, absolute: Tensors, of_terms: Tensors) -> Tensors:
        by_step = self.by_step.cancelled(kernel, self._of_steps(absolute), self._of_steps(of_terms))
        return of_terms | {"log_decay": by_step["log_decay"][:, :: self.steps]}

    def _of_steps(self, x: Tensors) -> Tensors:
        """Return the inputs of the delta rule of the steps: queries and log-decays are zero at the steps between."""
        q = F.pad(x["q"][:, :, None], (0, 0, 0, 0, self.steps - 1, 0)).flatten(1, 2)
        log_decay = F.pad(x["log_decay"][:, :, None], (0, 0, 0, self.steps - 1)).flatten(1, 2)
        return x | {"q": q, "log_decay": log_decay}

    def _of_tokens(self, results: Tensors) -> Tensors:
        return results | {"output": results["output"][:, self.steps - 1 :: self.steps]}


@dataclass(frozen=True, kw_only=True, repr=False)
class LongConvolutionCase(ConvolutionCase):
    """One call of `long_convolution`, whose filters have `key_width` taps (notation: ops/convolution/long.py)."""

    past: int = 0
    """Number of tokens before the segment, P."""
    has_bias: bool = False

    names = ("x", "filters")
    axes: ClassVar[Mapping[str, str]] = {"output": "BTC", "x": "BTC", "filters": "CK", "state": "NPC"}

    @property
    def sizes_of_axes(self) -> dict[str, int]:
        return super().sizes_of_axes | {"P": self.past}

    def define(self, inputs: Tensors) -> Tensors:
        """Compute y_t = sum_{i<L} h[:, i] x_{t-i}, token by token."""
        taps = inputs["filters"].flip(1).T  # the newest token's tap last

        def step(past: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            inputs_so_far = torch.cat((past, x[None]))
            reach = min(len(inputs_so_far), len(taps))
            return inputs_so_far, (inputs_so_far[-reach:] * taps[-reach:]).sum(0)

        return self.recurrence(inputs, step)

    def terms(self, inputs: Tensors, absolute: Tensors) -> Tensors:
        del inputs
        return self.define(absolute)

    def call(self, inputs: Tensors) -> Any:
        raise NotImplementedError("the long convolution has no kernels to choose from")
