"""RWKV-4's time mixing (Peng et al., arXiv 2305.13048, Eq. 11 to 17).

    r_t, k_t, v_t = (mu * x_t + (1 - mu) * x_{t-1}) W    a mu and a W for each of the three
    wkv_t = (num_{t-1} + e^{u + k_t} v_t) / (den_{t-1} + e^{u + k_t})
    num_t = e^{-w} num_{t-1} + e^{k_t} v_t              den_t = e^{-w} den_{t-1} + e^{k_t}
    y     = (sigmoid(r) * wkv) W_o                      w = e^{decay} and u: one scalar per channel

These sums can leave the range of floats, so the state stores the mean b = num / den, and l = log den.

    l_t = log(e^{l_{t-1} - w} + e^{k_t})                z_t = sigmoid(k_t + w - l_{t-1})
    b_t = (1 - z_t) b_{t-1} + z_t v_t                   wkv_t = b_{t-1} + sigmoid(u + k_t - l_{t-1}) (v_t - b_{t-1})

The authors' code instead divides num and den by the exponential of a running maximum, for the same purpose. In it, the
matrices of k, r and the output start at 0; here all start orthogonal, as that of v does there. RWKV's channel mixing is
the separate mixer `channel_mix`.
"""

from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.scan import LOG_STATE, log_scan, scan
from .base.roles import Role
from .parts import Call
from .parts.scan_state import ScanConfig, ScanMixer, ScanState
from .parts.token_shift import token_shift
from .parts.widths import head_width


class RWKV4Config(ScanConfig):
    """RWKV-4: a weighted mean of all values per channel, with weights that decay."""

    kind: Literal["rwkv4"] = "rwkv4"
    built_in = MappingProxyType({"gate": "sigmoid"})
    expand: float = Field(default=1.0, gt=0, le=1000, examples=[2.0])
    """Number of channels, each with a mean of its values, divided by d_model."""

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "RWKV4":
        return RWKV4(self, d_model, layer_idx, n_layers)


class RWKV4(ScanMixer):
    """Layer configured by `RWKV4Config`; decays and mu start as in the authors' code for its depth."""

    op = "scan"

    def __init__(self, config: RWKV4Config, d_model: int, layer_idx: int, n_layers: int) -> None:
        self.width = head_width(d_model, config.expand, 1, "expand")
        super().__init__(config, 2, self.width)
        self.depth = layer_idx / max(n_layers - 1, 1), layer_idx / n_layers
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.empty(d_model)) for _ in range(3))
        self.k_proj, self.v_proj, self.r_proj = (nn.Linear(d_model, self.width, bias=False) for _ in range(3))
        self.time_decay, self.time_first = (nn.Parameter(torch.empty(self.width)) for _ in range(2))
        self.parameter_roles = {"time_decay": Role.RATE}
        self.out_proj = nn.Linear(self.width, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise decay rates from e^-5 to e^3, bonuses around log 0.3 and mu by channel, and orthogonal
        matrices."""
        for layer in (self.k_proj, self.v_proj, self.r_proj, self.out_proj):
            matrix = torch.empty_like(layer.weight, dtype=self.state_dtype)  # orthogonal_ needs a wide dtype
            nn.init.orthogonal_(matrix, gain=max(layer.out_features / layer.in_features, 1) ** 0.5)
            layer.weight.copy_(matrix)
        depth = self.depth[0]
        remaining_depth = 1 - self.depth[1]
        device = self.device
        exact = torch.float64
        channel = torch.arange(self.width, device=device, dtype=exact)
        fraction = torch.arange(len(self.mix_k), device=device, dtype=exact) / len(self.mix_k)
        self.time_decay.copy_(-5 + 8 * (channel / max(self.width - 1, 1)) ** (0.7 + 1.3 * depth))
        self.time_first.copy_(torch.tensor(0.3).log() + 0.5 * ((channel + 1) % 3 - 1))
        self.mix_k.copy_(fraction**remaining_depth)
        self.mix_v.copy_(fraction**remaining_depth + 0.3 * depth)
        self.mix_r.copy_(fraction ** (0.5 * remaining_depth))

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], ScanState | None]:
        state = self.init_state(call.rows(x.shape[0])) if call.state is None else call.state
        wide = self.state_dtype
        shifted, recent = token_shift(x, state.recent, call)
        mixed = (torch.lerp(shifted, x, mu.to(x.dtype)) for mu in (self.mix_k, self.mix_v, self.mix_r))
        k, v, r = (layer(y) for layer, y in zip((self.k_proj, self.v_proj, self.r_proj), mixed, strict=True))
        k, v, dtype = k.to(wide), v.to(wide), v.dtype
        mean, weight = state.memory.unbind(1)
        log_decay = -self.time_decay.to(wide).exp()
        weights, weight_after = log_scan(k, log_decay.expand_as(k), call._replace(state=weight))
        previous_weight, _ = token_shift(weights, weight[:, None], call)
        # sigmoid(log_odds) and sigmoid(-log_odds) add up to 1 despite rounding
        log_odds = (previous_weight + log_decay - k).to(wide)
        means, mean_after = scan((-log_odds).sigmoid() * v, F.logsigmoid(log_odds), call._replace(state=mean))
        previous_mean, _ = token_shift(means, mean[:, None].to(wide), call)
        share = (self.time_first.to(wide) + k - previous_weight).sigmoid().to(wide)
        wkv = torch.lerp(previous_mean, v, share)
        y = self.out_proj((r.to(wide).sigmoid() * wkv).to(dtype))
        if mean_after is None or weight_after is None or recent is None:
            return y, None
        memory = torch.stack((mean_after, weight_after), dim=1)
        return y, self.state_after(x, memory, recent.to(self.dtype), call)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> ScanState:
        state = super().init_state(batch_size)
        mean = state.memory[:, 0].to(LOG_STATE)
        memory = torch.stack((mean, torch.full_like(mean, -torch.inf)), dim=1)
        recent = torch.zeros(batch_size, 1, len(self.mix_k), device=self.device, dtype=self.dtype)
        return state._replace(memory=memory, recent=recent)
