"""Test-time training layers, TTT-Linear and TTT-MLP (Sun et al., arXiv 2407.04620).

    q, k, v  = x W_Q, x W_K, x W_V by head              q, k rotated by the place in the mini-batch
    r_t      = base sigmoid(x_t w + a) / D              learning rate of a token, per head
    c_i      = max(1 / i + s_i, 0)                      i: place of t in its mini-batch, from 1; s learned
    f(x)     = x + LN(x W + b), or x + LN(gelu(x W + b) W' + b')
    W_t      = W_0 - c_i sum_{j<=t} r_j grad |f(k_j) - v_j|^2 / 2      gradients at the mini-batch's start, W_0
    y        = LN(f_{W_t}(q_t)) W_O                     W_0 of the first mini-batch is learned

The state is a small network that learns, token by token, to map keys to values. A mini-batch of `mini_batch` tokens is
a part of the definition, not of the algorithm: its tokens take gradients at the same weights. A document starts a
mini-batch, and a text may be cut anywhere, as the sums of gradients and the place are in the state. The recurrent
paradigm computes W_t (the paper's primal form), the chunkwise paradigm a mini-batch at once (the dual form).

As in the authors' code, LN is the same in the loss and the output, with weights per head, and the base rate is 1 for
`linear` and 0.1 for `mlp`, whose hidden layer is 4 times as wide. Differences: queries and keys have projections of
their own and no convolution by default (the code's variant with a Transformer backbone); gates are left out.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from ..ops.ttt import FastLayer, Norm, ttt, ttt_flops
from .base.contract import MixerConfig
from .base.roles import Role
from .base.traits import ContractError, Traits
from .parts import Call, Paradigm, ShortConv, rotated
from .parts.fast_weights import FastWeightMixer, FastWeightState, fast_weight_traits
from .parts.qkv import Heads


class TTTConfig(MixerConfig):
    """Test-time training: the state is a small network, trained on keys and values while it reads them."""

    kind: Literal["ttt"] = "ttt"
    n_heads: Heads
    inner: Literal["linear", "mlp"] = "linear"
    """Network in the state: one linear layer, or two with a gelu between them."""
    mini_batch: int = Field(default=16, gt=0, le=2**16, examples=[4, 1, 3])
    """Tokens that take gradients at the same weights. It changes the function, unlike a chunk size."""
    base_rate: float | None = Field(default=None, gt=0, le=1000, examples=[0.5])
    """Learning rate of a token with an open gate, times the width of a head; null for 1 (linear) or 0.1 (mlp)."""
    rotation_base: float = Field(default=10000.0, gt=1)
    """Base of the rotation frequencies."""
    short_conv: ShortConv = None
    norm_eps: float = Field(default=1e-6, gt=0)
    """Constant added to the variance in both layer norms."""
    paradigm: Paradigm = Field(default=Paradigm.CHUNKWISE, strict=False)
    """Paradigm of training and evaluation."""

    @property
    def traits(self) -> Traits:
        """Traits of mixers with fast weights."""
        return fast_weight_traits(self.mini_batch)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "TTT":
        return TTT(self, d_model)


class TTT(FastWeightMixer):
    """Layer configured by `TTTConfig`."""

    def __init__(self, config: TTTConfig, d_model: int) -> None:
        super().__init__(config, d_model, vectors=["q", "k", "v"], rates=["rate"])

    def build_network(self, d_model: int) -> None:
        config, heads, width = self.config, self.config.n_heads, self.widths[0]
        if width % 2:
            raise ContractError(f"ttt rotates pairs of dimensions and needs heads of even width, got {width}")
        self.rate_bias = nn.Parameter(torch.empty(heads))
        self.step_factor = nn.Parameter(torch.empty(config.mini_batch))
        shapes = pairwise(self.widths)
        self.initial_weights = nn.ParameterList(nn.Parameter(torch.empty(heads, *shape)) for shape in shapes)
        self.initial_biases = nn.ParameterList(nn.Parameter(torch.empty(heads, 1, n)) for n in self.widths[1:])
        self.inner_norm_weight = nn.Parameter(torch.empty(heads, width))
        self.inner_norm_bias = nn.Parameter(torch.empty(heads, width))
        self.norm = nn.LayerNorm(d_model, eps=config.norm_eps)
        self.parameter_roles = {
            "in_proj.weight": self.row_blocks,
            "rate_bias": Role.RATE,
            "step_factor": Role.RATE,
            "inner_norm_weight": Role.NORM,
            "inner_norm_bias": Role.NORM,
            **{f"initial_weights.{n}": Role.VECTOR for n in range(len(self.initial_weights))},
            **{f"initial_biases.{n}": Role.VECTOR for n in range(len(self.initial_biases))},
        }

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for bias in (self.rate_bias, self.step_factor, self.inner_norm_bias, *self.initial_biases):
            nn.init.zeros_(bias)
        nn.init.ones_(self.inner_norm_weight)

    def learn(
        self,
        qk: Float[Tensor, "B T 2H K"],
        v: Float[Tensor, "B T H K"],
        others: Sequence[Tensor],
        state: FastWeightState,
        call: Call,
    ) -> tuple[Float[Tensor, "B T D"], Sequence[FastLayer] | None]:
        config, wide = self.config, self.state_dtype
        (rate,) = others
        positions = call.positions(qk, None if call.state is None else state.position) % config.mini_batch
        q, k = rotated(qk, positions, "rope", config.rotation_base).chunk(2, dim=2)
        rate = self.base_rate / self.widths[0] * (rate.to(wide) + self.rate_bias.to(wide)).sigmoid()
        place = torch.arange(1, config.mini_batch + 1, device=qk.device, dtype=wide)
        factor = (1 / place + self.step_factor.to(wide)).clamp(min=0)
        norm = Norm(self.inner_norm_weight, self.inner_norm_bias, config.norm_eps)
        o, layers = ttt(q, k, v, rate, factor, state.memory, state.position, call, norm)
        return self.norm(o.flatten(2)), layers

    def initial_layers(self, batch_size: int) -> list[FastLayer]:
        layers = []
        for pair in zip(self.initial_weights, self.initial_biases, strict=True):
            weight, bias = (x.to(self.state_dtype).repeat(batch_size, 1, 1, 1) for x in pair)
            layers.append(FastLayer(weight, bias, torch.zeros_like(weight), torch.zeros_like(bias)))
        return layers

    def network_flops(self, length: int, paradigm: Paradigm, context: int) -> int:
        return ttt_flops(paradigm, length, self.widths, self.config.mini_batch, context)
