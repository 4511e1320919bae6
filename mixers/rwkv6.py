"""RWKV-6's time mixing, Finch (Peng et al., arXiv 2404.05892, §4).

    z_t   = x_t + mu^x * (x_{t-1} - x_t)
    x^i_t = x_t + (mu^i + tanh(z_t A^i) B^i) * (x_{t-1} - x_t)      for each i of w, k, v, r, g
    r, k, v, g = x^r W_r, x^k W_k, x^v W_v, x^g W_g                 by head
    w_t   = exp(-exp(tanh(x^w W_1) W_2 + b))                        one decay per key dimension
    o_t   = r_t (S_{t-1} + diag(u) k_t v_t^T)                       u: one parameter per head and key dimension
    S_t   = diag(w_t) S_{t-1} + k_t v_t^T
    y     = (silu(g) * GroupNorm(o)) W_o                            one group per head

The query reads the state before the token. The op's query reads the state after it, so the op has keys, values and
decays of the previous token, and the last token is added to the final state. RWKV's channel mixing is the mixer
`channel_mix`, gated as in RWKV-4. One difference from the authors' code: W_o and the low-rank maps start random, not at
0.
"""

from types import MappingProxyType
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.decay import decay
from ..ops.runtime.paradigm import Paradigm
from .base.roles import Role, RowBlock
from .parts import Call, LowRank, MatrixState, MatrixStateConfig, MatrixStateMixer, head_width
from .parts.bonus_norm import GroupNorm
from .parts.projections import apply_row_blocks
from .parts.qkv import Heads
from .parts.token_shift import DynamicMix, token_shift

MAX_RATE = 10.0
"""Greatest logarithm of a decay rate: exp(-e^10) is 0, also in float64."""


class RWKV6Config(MatrixStateConfig):
    """RWKV-6: a matrix state per head with a decay per key dimension, and a bonus for a token's own value."""

    kind: Literal["rwkv6"] = "rwkv6"
    built_in = MappingProxyType({"gate": "swish", "head_norm": "group"})
    n_heads: Heads
    mix_rank: int = Field(default=32, gt=0, le=2**20, examples=[3])
    """Rank of each map from tokens to the mixtures with the previous token."""
    decay_rank: int = Field(default=64, gt=0, le=2**20, examples=[2])
    """Rank of the map from tokens to decays."""
    norm_eps: float = Field(default=1e-5, ge=0)
    """Constant that is multiplied by the width of a head and added to the variance in the output norm."""

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "RWKV6":
        return RWKV6(self, d_model, layer_idx, n_layers)


class RWKV6(MatrixStateMixer):
    """Layer configured by `RWKV6Config`; mu, decays and bonuses start as in the authors' code for its depth."""

    log_decay_shape = "B T H K"

    def __init__(self, config: RWKV6Config, d_model: int, layer_idx: int, n_layers: int) -> None:
        super().__init__(config)
        self.config = config
        self.n_heads = config.n_heads
        self.depth = layer_idx / max(n_layers - 1, 1)
        self.key_dim = self.value_dim = head_width(d_model, 1.0, config.n_heads, "1")
        self.token_mix = DynamicMix(d_model, config.mix_rank, layer_idx, n_layers)
        self.in_proj, self.out_proj = (nn.Linear(d_model, n * d_model, bias=False) for n in (4, 1))
        self.decay_proj = LowRank(d_model, config.decay_rank, d_model, bias=True, activation="tanh", role=Role.GATE)
        self.bonus = nn.Parameter(torch.empty(self.n_heads, self.key_dim))
        self.parameter_roles = {
            "in_proj.weight": [RowBlock(name, d_model, heads=self.n_heads) for name in ("r", "k", "v", "gate")],
            "bonus": Role.VECTOR,
        }
        self.norm = GroupNorm(self.n_heads, self.key_dim, config.norm_eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise mu, decays and bonuses by channel and depth, and orthogonal matrices."""
        for layer in cast("Any", self.children()):
            layer.reset_parameters()
        gains = (1, 0.1, 1, 0.1, 1)
        for weight, gain in zip((*self.in_proj.weight.chunk(4), self.out_proj.weight), gains, strict=True):
            weight.copy_(nn.init.orthogonal_(torch.empty_like(weight, dtype=torch.float32), gain=gain))
        channel = torch.arange(self.bonus.numel(), device=self.device, dtype=torch.float64)
        fraction = channel / max(len(channel) - 1, 1)
        self.decay_proj.up.bias.copy_(-6 + 5 * fraction ** (0.7 + 1.3 * self.depth))
        zigzag = 0.1 * ((channel + 1) % 3 - 1)
        self.bonus.copy_((self.depth * (1 - fraction) + zigzag).view_as(self.bonus))

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], MatrixState | None]:
        wide = self.state_dtype
        recent = None if call.state is None else call.state.recent.to(x.dtype)
        previous, last = token_shift(x, recent, call)
        xw, xk, xv, xr, xg = self.token_mix(x, previous)
        r, k, v, gate = apply_row_blocks(self.in_proj, (xr, xk, xv, xg))
        log_decay = -self.decay_proj(xw).to(wide).clamp_max(MAX_RATE).exp()
        kv_before, kv_last = token_shift(torch.cat((k, v), dim=-1), None, call)
        decay_before, decay_last = token_shift(log_decay, None, call)
        r, k, v, gate = (self.by_head(y) for y in (r, k, v, gate))
        k_before, v_before = (self.by_head(y) for y in kv_before.chunk(2, dim=-1))
        o, memory = decay(r, k_before, v_before, self.by_head(decay_before), call.enter("memory"), scale=1.0)
        bonus = (self.bonus.to(wide) * r * k).sum(-1, keepdim=True)
        o = self.norm(o.to(wide) + bonus * v)
        y = self.out_proj((o * F.silu(gate.to(wide))).to(x.dtype).flatten(2))
        if memory is None or last is None or kv_last is None or decay_last is None:
            return y, None
        k_last, v_last = (self.by_head(y.to(wide))[:, 0] for y in kv_last.chunk(2, dim=-1))
        kept = self.by_head(decay_last.to(wide))[:, 0].exp()[..., None]
        memory = kept * memory + k_last[..., None] * v_last[..., None, :]
        return y, self.state_after(x, memory, last.to(self.dtype), call)

    def by_head(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H K"]:
        """Split the channels into heads."""
        return x.unflatten(-1, (self.n_heads, -1))

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> MatrixState:
        recent = torch.zeros(batch_size, 1, self.out_proj.in_features, device=self.device, dtype=self.dtype)
        return super().init_state(batch_size)._replace(recent=recent)

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        return super().flops(length, paradigm, context) + 2 * length * self.token_mix.up.numel()
