"""Short causal convolution, which many mixers have before their recurrence."""

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...ops.convolution import Activation, short_convolution
from ...ops.kernels.selection import choose
from ...ops.runtime.call import Call
from ...ops.runtime.kernel import Probe
from ...ops.runtime.paradigm import Paradigm
from ..base.roles import Role, Roles


class ShortConvolution(nn.Module):
    """Causal convolution of `width` channels over the last `kernel_size` tokens, followed by silu or nothing."""

    parameter_roles: ClassVar[Roles] = {"weight": Role.CONVOLUTION, "bias": Role.VECTOR}

    def __init__(self, width: int, kernel_size: int, *, bias: bool = False, activation: Activation = "silu") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.backend = "reference"
        """Kernel backend of the convolution, set by `choose_kernel`."""
        self.weight = nn.Parameter(torch.empty(width, kernel_size))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.reset_parameters()

    @classmethod
    def of(
        cls, kernel_size: int | None, width: int, *, bias: bool = False, activation: Activation = "silu"
    ) -> "ShortConvolution | None":
        """Build the convolution for a configuration's field `short_conv`; return None if the field is 0 or null."""
        return cls(width, kernel_size, bias=bias, activation=activation) if kernel_size else None

    def choose_kernel(self, backend: str, dtype: torch.dtype) -> None:
        """Choose the kernel backend of the convolution for the backend of its mixer.

        A backend that the convolution does not have, such as `triton`, means `auto`.
        """
        width, kernel_size = self.weight.shape
        probe = Probe(device=self.weight.device, dtype=dtype, key_width=kernel_size, value_width=width)
        named = backend if backend in ("reference", "native") else "auto"
        self.backend = choose("short_convolution", named, probe)[Paradigm.PARALLEL]

    def reset_parameters(self) -> None:
        """Initialise uniformly within 1/sqrt(kernel_size), as `nn.Conv1d` does."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Float[Tensor, "B T width"], call: Call
    ) -> tuple[Float[Tensor, "B T width"], Float[Tensor, "N kernel_size-1 width"] | None]:
        """Convolve one segment; return the output and the final state.

        The state has the last inputs, oldest first, in the parameters' dtype, which differs from that of x under
        autocast.
        """
        call = call._replace(backend=self.backend)
        output, final_state = short_convolution(x, self.weight, self.bias, call, activation=self.activation)
        return output, None if final_state is None else final_state.to(self.weight.dtype)

    def init_state(self, batch_size: int) -> Float[Tensor, "B kernel_size-1 width"]:
        """Return the initial state, zeros."""
        width, kernel_size = self.weight.shape
        return self.weight.new_zeros(batch_size, kernel_size - 1, width)
