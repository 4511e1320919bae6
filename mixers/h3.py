"""H3 (Fu et al., arXiv 2212.14052, §3.1 and Algorithm 1, with heads of width 1).

    q, k, v = x W_Q, x W_K, x W_V
    u   = conv(k) * v                       the shift SSM: a filter per channel over the last tokens
    h_t = e^{Delta A} h_{t-1} + u_t         the diagonal SSM: N / 2 complex numbers per channel, A = -e^{a} + i b
    o_t = q_t * (2 Re(C B h_t) + D u_t)     B = (e^{Delta A} - 1) / A           y = o W_O

The state space model is S4D's (Gu et al., arXiv 2206.11893), discretised by a zero-order hold. Its complex numbers come
in conjugate pairs, of which only one is stored. The authors' code computes it as a long convolution; here it is a scan,
so that the state has the same size in every paradigm. Three more differences from the authors' code: there, the shift
sees N tokens, the discretisation is bilinear by default, and all projections have biases.
"""

import math
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.scan import diagonal_scan
from .base.roles import Role, RowBlock
from .parts import Call, ShortConvolution
from .parts.matrix_state import Chunk
from .parts.scan_state import ScanConfig, ScanMixer, ScanState
from .parts.time_step import in_range


class H3Config(ScanConfig):
    """H3: a shift and a diagonal state space model, with a multiplication before and after the diagonal one."""

    kind: Literal["h3"] = "h3"
    d_state: int = Field(default=64, ge=2, le=2**20, multiple_of=2, examples=[6, 2])
    """Size N of the state per channel, in real numbers."""
    short_conv: int = Field(default=4, gt=0, le=64, examples=[2])
    """Width of the shift in tokens."""
    time_step_range: Annotated[tuple[float, float], in_range(1e-6, 1e3)] = Field(default=(1e-3, 0.1), strict=False)
    """Range of the initial step sizes Delta, evenly spaced in the logarithm; from 1e-6 to 1e3."""
    chunk_size: Chunk = 16

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "H3":
        return H3(self, d_model)


class H3(ScanMixer):
    """Layer configured by `H3Config`."""

    op = "diagonal_scan"

    def __init__(self, config: H3Config, d_model: int) -> None:
        pairs = config.d_state // 2
        super().__init__(config, pairs, d_model, 2)
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.convolution = ShortConvolution(d_model, config.short_conv, activation="none")
        self.log_step = nn.Parameter(torch.empty(d_model))
        self.A_log, self.A_imag = (nn.Parameter(torch.empty(pairs, d_model)) for _ in range(2))
        self.C = nn.Parameter(torch.empty(pairs, d_model, 2))
        self.parameter_roles = {
            "in_proj.weight": [RowBlock(name, d_model) for name in ("q", "k", "v")],
            "log_step": Role.RATE,
            "A_log": Role.RATE,
            "A_imag": Role.RATE,
            "C": Role.VECTOR,
        }
        self.D = nn.Parameter(torch.empty(d_model))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise A as S4D-Lin, -1/2 + i pi n; C and D from normal distributions, and the rest as torch does."""
        super().reset_parameters()
        self.log_step.uniform_(*map(math.log, self.config.time_step_range))
        nn.init.constant_(self.A_log, math.log(0.5))
        self.A_imag.copy_(math.pi * torch.arange(len(self.A_imag), device=self.device)[:, None])
        nn.init.normal_(self.C, std=0.5**0.5)
        nn.init.normal_(self.D)

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], ScanState | None]:
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        k, recent = self.convolve(k, call)
        wide = self.state_dtype  # products leave the range of float16
        u = k.to(wide) * v.to(wide)
        o, memory = diagonal_scan(u, *call.once(self.diagonal), call.enter("memory"))
        y = self.out_proj((q.to(wide) * (o + self.D.to(wide) * u)).to(q.dtype))
        return y, self.state_after(x, memory, recent, call)

    def diagonal(self) -> tuple[Float[Tensor, "K D"], Float[Tensor, "K D"], Float[Tensor, "K D 2"]]:
        """Return real and imaginary part of Delta A, [K D] each, and 2 C B as pairs of real numbers; all in float64.

        Compilers do not support complex numbers, and angles need float64.
        """
        step, rate, turn, c = (y.double() for y in (self.log_step, self.A_log, self.A_imag, self.C))
        step = step.exp()
        rate = -rate.exp()
        log_decay = step * rate
        angle = step * turn
        # e^{Delta A} - 1, whose real part is small where Delta is: e^a cos b - 1 = expm1(a) cos b - 2 sin(b/2)^2
        real = torch.expm1(log_decay) * angle.cos() - 2 * (angle / 2).sin().square()
        imaginary = log_decay.exp() * angle.sin()
        size = rate.square() + turn.square()
        real, imaginary = (real * rate + imaginary * turn) / size, (imaginary * rate - real * turn) / size
        (a, b), c = (real, imaginary), 2 * c
        return log_decay, angle, torch.stack((a * c[..., 0] - b * c[..., 1], a * c[..., 1] + b * c[..., 0]), dim=-1)
