"""Neural long-term memory of Titans (Behrouz et al., arXiv 2501.00663, section 3), the layer that the paper calls LMM.

    q, k, v = silu(conv(x W_Q)), silu(conv(x W_K)), silu(conv(x W_V)) by head;  q and k divided by their norms
    eta_t, alpha_t, r_t = sigmoid(x_t W_m + b_m), sigmoid(x_t W_f + b_f), sigmoid(x_t W_r + b_r)
    theta_t = base (1 - eta_t) r_t / mini_batch                     learning rate
    M(x)    = x W, or x + LN(gelu(x W + b) W' + b')
    U_t     = eta_t U_{t-1} - theta_t grad |M(k_t) - v_t|^2        gradient at the weights of the mini-batch's start
    M_t     = (1 - alpha_t) M_{t-1} + U_t                           M_0 is learned, U_0 = 0
    y       = (RMSNorm(M_t(q_t)) * silu(x W_G)) W_O                 the norm is per head, its weights are shared

The state is a small network that learns to map keys to values by gradient descent with momentum and weight decay. All
rates are one scalar per token and head. A mini-batch of `mini_batch` tokens is a part of the definition, as in `ttt`:
its tokens take gradients at the same weights, and a document starts one. The recurrent paradigm computes M_t, the
chunkwise paradigm a mini-batch at once (section 3.2).

The paper has no code and leaves much open. Chosen here: heads, the size of a mini-batch, the sigmoids, and what their
biases start at. The factors of theta keep a linear memory stable, with a base up to 1: gradients are taken at the same
weights, so that a run of the same token would otherwise overshoot further with every mini-batch. In the `mlp`, the
gelu, the hidden layer of 4 times the width, the residual connection and LN, with weights per head, are those of the
authors' later work (Miras, arXiv 2504.13173); without LN, gradient descent on two layers can diverge. Persistent
memory, and the attention beside the memory (MAC, MAG, MAL), are left out.

Keep the values of an `mlp` of order 1. Gradient descent on two layers is chaotic when they are 20 times as large: after
some hundred tokens the rounding of float32 decides what the state is, and `seqmix check titans inner=mlp` says so
(long_segments_do_not_drift). A linear memory passes all checks.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.delta import unit_norm
from ..ops.ttt import MomentumLayer, Norm, titans, titans_flops
from .base.contract import MixerConfig
from .base.roles import Role
from .base.traits import Traits
from .parts import Call, GatedNorm, Paradigm, ShortConv
from .parts.fast_weights import FastWeightMixer, FastWeightState, fast_weight_traits
from .parts.qkv import Heads, OutputGate

FIRST_BIASES = (0.0, 0.0, -5.0)
"""Biases of rate, momentum and forget gate at initialisation: sigmoids of 0.5, 0.5 and 0.007."""


class TitansConfig(MixerConfig):
    """Titans' memory: the state is a small network, trained with momentum and a forget gate while it reads."""

    kind: Literal["titans"] = "titans"
    n_heads: Heads
    inner: Literal["linear", "mlp"] = "linear"
    """Network in the state: a matrix, or two with a gelu between them, a layer norm and a residual connection."""
    mini_batch: int = Field(default=16, gt=0, le=1024, examples=[4, 1, 3])
    """Tokens that take gradients at the same weights. It changes the function, unlike a chunk size."""
    base_rate: float | None = Field(default=None, gt=0, le=100, examples=[0.5])
    """Learning rate of a mini-batch with open gates; null for 1 (linear) or 0.1 (mlp), as in `ttt`. Up to 1, a linear
    memory stays bounded in a run of the same token."""
    short_conv: ShortConv = 4
    gate: OutputGate = "swish"
    norm_eps: float = Field(default=1e-5, gt=0)
    """Constant added to the mean square in the output norm, and to the variance in the layer norm of the `mlp`."""
    paradigm: Paradigm = Field(default=Paradigm.CHUNKWISE, strict=False)
    """Paradigm of training and evaluation."""

    @property
    def traits(self) -> Traits:
        """Traits of mixers with fast weights."""
        return fast_weight_traits(self.mini_batch)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Titans":
        return Titans(self, d_model)


class Titans(FastWeightMixer):
    """Layer configured by `TitansConfig`."""

    silu_without_conv = True

    def __init__(self, config: TitansConfig, d_model: int) -> None:
        gate = [] if config.gate == "none" else ["gate"]
        super().__init__(config, d_model, vectors=["q", "k", "v", *gate], rates=["rate", "momentum", "forget"])

    def build_network(self, d_model: int) -> None:
        config, heads, width = self.config, self.config.n_heads, self.widths[0]
        self.rate_bias = nn.Parameter(torch.empty(3, heads))
        bias = int(config.inner == "mlp")  # a matrix's last row
        shapes = [(heads, rows + bias, columns) for rows, columns in pairwise(self.widths)]
        self.initial_weights = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        self.inner_norm = nn.Parameter(torch.empty(2, heads, width)) if config.inner == "mlp" else None
        self.norm = GatedNorm(width, "rms", config.gate, affine=True, eps=config.norm_eps)
        self.parameter_roles = {
            "in_proj.weight": self.row_blocks,
            "rate_bias": Role.RATE,
            **{f"initial_weights.{n}": Role.VECTOR for n in range(len(self.initial_weights))},
        }
        if self.inner_norm is not None:
            self.parameter_roles["inner_norm"] = Role.NORM

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for row, bias in zip(self.rate_bias, FIRST_BIASES, strict=True):
            row.fill_(bias)
        if self.inner_norm is not None:
            nn.init.ones_(self.inner_norm[0])
            nn.init.zeros_(self.inner_norm[1])

    def learn(
        self,
        qk: Float[Tensor, "B T 2H K"],
        v: Float[Tensor, "B T H K"],
        others: Sequence[Tensor],
        state: FastWeightState,
        call: Call,
    ) -> tuple[Float[Tensor, "B T D"], Sequence[MomentumLayer] | None]:
        config, heads, wide = self.config, self.config.n_heads, self.state_dtype
        *gate, rates = others
        q, k = unit_norm(qk).chunk(2, dim=2)
        rates = (rates.unflatten(-1, (3, heads)).to(wide) + self.rate_bias.to(wide)).sigmoid()
        rate, momentum, forget = rates.unbind(2)
        rate = self.base_rate / config.mini_batch * (1 - momentum) * rate
        norm = None if self.inner_norm is None else Norm(self.inner_norm[0], self.inner_norm[1], config.norm_eps)
        o, layers = titans(q, k, v, rate, momentum, forget, config.mini_batch, state.memory, state.position, call, norm)
        o = self.norm(o, gate[0].unflatten(-1, (heads, -1)) if gate else None)
        return o.to(v.dtype).flatten(2), layers

    def initial_layers(self, batch_size: int) -> list[MomentumLayer]:
        weights = [matrix.to(self.state_dtype).repeat(batch_size, 1, 1, 1) for matrix in self.initial_weights]
        return [MomentumLayer(weight, weight.clone(), torch.zeros_like(weight)) for weight in weights]

    def network_flops(self, length: int, paradigm: Paradigm, context: int) -> int:
        biased = self.config.inner == "mlp"
        return titans_flops(paradigm, length, self.widths, self.config.mini_batch, context, biased=biased)
