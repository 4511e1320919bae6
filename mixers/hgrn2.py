"""HGRN2 (gated linear recurrent networks with state expansion; Qin et al., arXiv 2404.07904, §3.2).

    q, v  = silu(x W_Q), x W_V by head
    f_t   = gamma + (1 - gamma) sigmoid(x_t W_F)        one scalar per key dimension
    S_t   = diag(f_t) S_{t-1} + (1 - f_t)^T v_t         o_t = q_t S_t / sqrt(K)
    y     = RMSNorm(o) W_O                              the norm is over all heads, with weights

Each key is 1 - f_t, so there is no key projection. gamma, the lower bound of the forget gate, is 0 in the first of L
layers and starts at l / L in layer l (from 0): deeper layers remember longer (HGRN, arXiv 2311.04823). In the paper,
the bounds of all layers are a cumulative softmax that starts at the same values; here each layer learns its own bounds,
one per key dimension. There is a factor 1/sqrt(K), which the norm cancels except for its eps.
"""

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..ops.decay import decay
from .base.roles import Role, Roles
from .parts import QKV, Call, QKVConfig, QKVMixer, RecurrenceOutput
from .parts.qkv import Affine, OutputGate


class HGRN2Config(QKVConfig):
    """HGRN2: a matrix state per head, in which decays and keys add up to 1."""

    kind: Literal["hgrn2"] = "hgrn2"
    qk_norm: Literal["none"] = "none"  # pyright: ignore[reportIncompatibleVariableOverride] narrower type
    """Always `none`: keys are 1 minus the decays."""
    rotation: Literal["none"] = "none"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Always `none`: decays that differ within a pair of dimensions do not commute with rotating the pair."""
    gate: OutputGate = "none"
    norm_affine: Affine = True

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "HGRN2":
        return HGRN2(self, d_model, layer_idx / n_layers)


class HGRN2(QKVMixer):
    """Layer configured by `HGRN2Config`. Lower bounds of the forget gates start at `bound`; 0 means no lower bounds."""

    log_decay_shape = "B T H K"
    activation = "none"  # silu would prevent forget gates from closing

    def __init__(self, config: HGRN2Config, d_model: int, bound: float) -> None:
        super().__init__(config, d_model)
        self.forget = ForgetGate(self.n_heads, self.key_dim, bound)
        self.norm = self.output_norm(self.n_heads * self.value_dim)

    def recur(self, x: Tensor, h: QKV, call: Call) -> RecurrenceOutput:
        log_forget, keys = self.forget(h.k.to(self.state_dtype))
        return decay(F.silu(h.q), keys.to(h.q.dtype), h.v, log_forget, call)

    def gated_norm(self, o: Float[Tensor, "B T H V"], gate: Float[Tensor, "B T H V"] | None) -> Tensor:
        # one norm over all heads
        return self.norm(o.flatten(2), None if gate is None else gate.flatten(2)).unflatten(2, (self.n_heads, -1))


class ForgetGate(nn.Module):
    """Forget gate f_t from logits, with a learned lower bound per key dimension that starts at `bound`; 0 for none."""

    parameter_roles: ClassVar[Roles] = {"bound": Role.RATE}

    def __init__(self, n_heads: int, key_dim: int, bound: float) -> None:
        super().__init__()
        self.start = bound
        self.bound = nn.Parameter(torch.empty(n_heads, key_dim)) if bound else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all lower bounds at `bound`."""
        if self.bound is not None:
            nn.init.constant_(self.bound, math.log(self.start / (1 - self.start)))

    def forward(self, logits: Float[Tensor, "B T H K"]) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T H K"]]:
        """Return the natural log of f_t, and 1 - f_t; neither is computed as a difference that would lose digits."""
        if self.bound is None:
            return F.logsigmoid(logits), (-logits).sigmoid()
        bound = self.bound.to(logits.dtype)
        complement = (-bound).sigmoid() * (-logits).sigmoid()  # 1 - f_t
        log_small = torch.logaddexp(F.logsigmoid(bound), F.logsigmoid(-bound) + F.logsigmoid(logits))
        return torch.where(complement < 0.5, torch.log1p(-complement.clamp(max=0.5)), log_small), complement
