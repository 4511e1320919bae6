"""minGRU (Feng et al., "Were RNNs All We Needed?", arXiv 2410.01201, §3.1 and Appendix B.3).

    z_t = sigmoid(x_t W_z)                  v_t = g(x_t W_h)
    h_t = (1 - z_t) h_{t-1} + z_t v_t
    y   = h W_O

g(v) = v + 1/2 above 0 and sigmoid(v) below: the log-space variant, which the paper trains, needs positive values. The
scan here takes no logarithm of states, so the plain variant, `candidate: linear`, allows any sign. With a short
convolution, x is convolved by channel first, as in the paper's language models. Projections have no bias.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.scan import scan
from .base.roles import Role, RowBlock
from .parts import Call, ShortConv, ShortConvolution
from .parts.scan_state import ScanConfig, ScanMixer, ScanState
from .parts.widths import head_width


class MinGRUConfig(ScanConfig):
    """minGRU: a gated recurrent unit whose gate depends only on the token, not on the state."""

    kind: Literal["min_gru"] = "min_gru"
    expand: float = Field(default=1.0, gt=0, le=1000, examples=[2.0])
    """Width of the state, divided by d_model."""
    candidate: Literal["positive", "linear"] = "positive"
    """Candidate v, the new value of the state: `positive` makes the projection positive (v + 1/2 above 0, sigmoid(v)
    below), `linear` uses the projection itself."""
    short_conv: ShortConv = None

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "MinGRU":
        return MinGRU(self, d_model)


class MinGRU(ScanMixer):
    """Layer configured by `MinGRUConfig`."""

    op = "scan"

    def __init__(self, config: MinGRUConfig, d_model: int) -> None:
        width = head_width(d_model, config.expand, 1, "expand")
        super().__init__(config, width)
        self.parameter_roles = {"in_proj.weight": [RowBlock("gate", width, Role.GATE), RowBlock("v", width)]}
        self.in_proj = nn.Linear(d_model, 2 * width, bias=False)
        self.out_proj = nn.Linear(width, d_model, bias=False)
        self.convolution = ShortConvolution.of(config.short_conv, d_model, bias=True, activation="none")
        self.reset_parameters()

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], ScanState | None]:
        u, recent = self.convolve(x, call)
        projected = self.in_proj(u)
        gate, v = projected.to(self.state_dtype).chunk(2, dim=-1)
        if self.config.candidate == "positive":
            v = torch.where(v >= 0, v + 0.5, v.sigmoid())
        # log(1 - z) as logsigmoid(-gate): 1 - z itself would round to 0 too early
        h, memory = scan(gate.sigmoid() * v, F.logsigmoid(-gate), call.enter("memory"))
        return self.out_proj(h.to(projected.dtype)), self.state_after(x, memory, recent, call)
