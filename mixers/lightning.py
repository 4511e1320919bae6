"""Lightning attention (TransNormerLLM, arXiv 2307.14995; Lightning Attention-2, 2401.04658; MiniMax-01, 2501.08313).

    q, k, v = silu(x W_Q), silu(x W_K), silu(x W_V) by head
    S_t = lambda S_{t-1} + k_t^T v_t                lambda is fixed for head h of H in layer l of L, all from 0
    o_t = q_t S_t
    y   = (sigmoid(x W_G) * RMSNorm(o)) W_O         one norm over all heads, with weights

    minimax:      lambda = exp(-2^(-8 (h+1) / H) (1 - l / (L - 1) + 1e-5))      head 0 decays fastest
    transnormer:  lambda = exp(-(8 h / H) (1 - l / L))                          head 0 never decays

With either schedule, the rest of the layer is MiniMax-01's: no positions, and no factor 1/sqrt(K), which the norm would
cancel except for its eps. TransNormerLLM has silu only on queries and keys, a norm without weights, a gate without an
activation, and rotary positions in its first layer. In a model of one layer, l / (L - 1) counts as 0. If H is not a
power of two, the formula applies unchanged, as in transformers. MiniMax's code instead gives the remaining heads every
other slope of the next power of two, as ALiBi does.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..ops.decay import decay
from .parts import QKV, Call, QKVConfig, QKVMixer, RecurrenceOutput
from .parts.qkv import Affine, OutputGate


class LightningConfig(QKVConfig):
    """Lightning attention: a matrix state per head, with a decay fixed by head and layer."""

    kind: Literal["lightning"] = "lightning"
    schedule: Literal["minimax", "transnormer"] = "minimax"
    """Schedule of the decays, from MiniMax-01 or TransNormerLLM; in both, deeper layers remember longer."""
    gate: OutputGate = "sigmoid"
    norm_affine: Affine = True

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Lightning":
        return Lightning(self, d_model, layer_idx, n_layers)


class Lightning(QKVMixer):
    """Layer configured by `LightningConfig`."""

    log_decay_shape = "H"
    silu_without_conv = True
    gains = (2**-0.5, 1.0)

    def __init__(self, config: LightningConfig, d_model: int, layer_idx: int, n_layers: int) -> None:
        super().__init__(config, d_model)
        self.layer_idx = layer_idx
        self.n_layers = n_layers
        self.norm = self.output_norm(self.n_heads * self.value_dim)

    def recur(self, x: Tensor, h: QKV, call: Call) -> RecurrenceOutput:
        return decay(h.q, h.k, h.v, call.once(self.log_decay).to(self.state_dtype), call, scale=1.0)

    def gated_norm(self, o: Float[Tensor, "B T H V"], gate: Float[Tensor, "B T H V"] | None) -> Tensor:
        # one norm over all heads
        return self.norm(o.flatten(2), None if gate is None else gate.flatten(2)).unflatten(2, (self.n_heads, -1))

    def op_dtype(self, dtype: torch.dtype) -> torch.dtype:
        # with slow decays the output grows with T, and before the norm it would leave the range of float16
        return torch.float32 if dtype == torch.float16 else dtype

    def log_decay(self) -> Float[Tensor, " H"]:
        """Return the natural log of each head's decay, float64."""
        heads = torch.arange(self.n_heads, device=self.device, dtype=torch.float64)
        if self.config.schedule == "transnormer":
            return -8 * heads / self.n_heads * (1 - self.layer_idx / self.n_layers)
        depth = self.layer_idx / max(self.n_layers - 1, 1)
        return -torch.exp2(-8 * (heads + 1) / self.n_heads) * (1 - depth + 1e-5)
