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

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from ..ops.delta import unit_norm
from ..ops.ttt import TTT_PARADIGMS, MomentumLayer, Norm, titans, titans_flops
from .base.contract import MixerConfig, SequenceMixer
from .base.roles import Role, RowBlock
from .base.traits import Traits
from .parts import Call, GatedNorm, Paradigm, ShortConv, ShortConvolution, head_width
from .parts.projections import projections_of
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
        """Traits: primal and dual form, and a constant state whose mini-batches depend on the position."""
        return Traits(
            paradigms=TTT_PARADIGMS,
            state="constant",
            packing=True,
            # with mini-batches of one token there are no places in them
            shift_invariant=self.mini_batch == 1,
        )

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Titans":
        return Titans(self, d_model)


class LinearMemory(NamedTuple):
    """Network in the state of `inner: linear`."""

    output: MomentumLayer


class MLPMemory(NamedTuple):
    """Network in the state of `inner: mlp`."""

    hidden: MomentumLayer
    output: MomentumLayer


class TitansState(NamedTuple):
    """State of a Titans layer after a prefix."""

    memory: LinearMemory | MLPMemory
    """Network in the state with its momentum, float32 or float64."""
    recent: Float[Tensor, "B W-1 C"]
    """Last inputs of the short convolution, oldest first; empty without a short convolution."""
    position: Int[Tensor, " B"]
    """Number of tokens processed; the place in the mini-batch is its remainder."""


class Titans(SequenceMixer[TitansState]):
    """Layer configured by `TitansConfig`."""

    def __init__(self, config: TitansConfig, d_model: int) -> None:
        super().__init__(config)
        self.config = config
        heads = config.n_heads
        width = head_width(d_model, 1.0, heads, "1")
        self.widths = [width, width] if config.inner == "linear" else [width, 4 * width, width]
        self.base_rate = config.base_rate or (1.0 if config.inner == "linear" else 0.1)
        gated = config.gate != "none"
        self.row_blocks = [RowBlock(name, d_model, heads=heads) for name in ("q", "k", "v", "gate")[: 3 + gated]]
        self.row_blocks += [RowBlock(name, heads, Role.GATE) for name in ("rate", "momentum", "forget")]
        self.in_proj = nn.Linear(d_model, (3 + gated) * d_model + 3 * heads, bias=False)
        self.rate_bias = nn.Parameter(torch.empty(3, heads))
        self.convolution = ShortConvolution.of(config.short_conv, 3 * d_model)
        bias = int(config.inner == "mlp")  # a matrix's last row
        shapes = [(heads, rows + bias, columns) for rows, columns in pairwise(self.widths)]
        self.initial_weights = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        self.inner_norm = nn.Parameter(torch.empty(2, heads, width)) if config.inner == "mlp" else None
        self.norm = GatedNorm(width, "rms", config.gate, affine=True, eps=config.norm_eps)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.parameter_roles = {
            "in_proj.weight": self.row_blocks,
            "rate_bias": Role.RATE,
            **{f"initial_weights.{n}": Role.VECTOR for n in range(len(self.initial_weights))},
        }
        if self.inner_norm is not None:
            self.parameter_roles["inner_norm"] = Role.NORM
        self.initial_std = 0.02
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as `ttt`: normal matrices with a standard deviation of 0.02, which muP scales."""
        for matrix in (self.in_proj.weight, self.out_proj.weight, *self.initial_weights):
            nn.init.normal_(matrix, std=self.initial_std)
        for row, bias in zip(self.rate_bias, FIRST_BIASES, strict=True):
            row.fill_(bias)
        if self.inner_norm is not None:
            nn.init.ones_(self.inner_norm[0])
            nn.init.zeros_(self.inner_norm[1])
        self.norm.reset_parameters()
        if self.convolution is not None:
            self.convolution.reset_parameters()

    def scale_like(self, base: Any) -> None:
        super().scale_like(base)
        # a constant standard deviation would not fall with the fan-in
        self.initial_std = base.initial_std * (base.widths[0] / self.widths[0]) ** 0.5

    @property
    def projections(self) -> dict[str, Float[Tensor, "H _ D"]]:
        return projections_of(self.in_proj, self.out_proj, self.row_blocks, self.config.n_heads)

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], TitansState | None]:
        config, wide, width = self.config, self.state_dtype, x.shape[-1]
        heads = config.n_heads
        qkv, *gate, rates = self.in_proj(x).split([3 * width, *[width] * (config.gate != "none"), 3 * heads], dim=-1)
        state = self.init_state(call.rows(x.shape[0])) if call.state is None else call.state
        recent = state.recent
        if self.convolution is None:
            qkv = nn.functional.silu(qkv)
        else:
            qkv, recent = self.convolution(qkv, call.enter("recent"))
        qk, v = qkv.unflatten(-1, (3 * heads, -1)).split([2 * heads, heads], dim=2)
        q, k = unit_norm(qk).chunk(2, dim=2)
        rates = (rates.unflatten(-1, (3, heads)).to(wide) + self.rate_bias.to(wide)).sigmoid()
        rate, momentum, forget = rates.unbind(2)
        rate = self.base_rate / config.mini_batch * (1 - momentum) * rate
        norm = None if self.inner_norm is None else Norm(self.inner_norm[0], self.inner_norm[1], config.norm_eps)
        size, start = config.mini_batch, state.position
        o, layers = titans(q, k, v, rate, momentum, forget, size, state.memory, start, call, norm)
        o = self.norm(o, gate[0].unflatten(-1, (heads, -1)) if gate else None)
        y = self.out_proj(o.to(v.dtype).flatten(2))
        if layers is None:
            return y, None
        position = call.advance(x, None if call.state is None else call.state.position)
        return y, TitansState(state.memory._make(layers), recent, position)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> TitansState:
        del max_length
        layers = []
        for matrix in self.initial_weights:
            weight = matrix.to(self.state_dtype).repeat(batch_size, 1, 1, 1)
            layers.append(MomentumLayer(weight, weight.clone(), torch.zeros_like(weight)))
        if self.convolution is None:
            recent = torch.zeros(batch_size, 0, 0, device=self.device, dtype=self.dtype)
        else:
            recent = self.convolution.init_state(batch_size)
        memory = LinearMemory(*layers) if self.config.inner == "linear" else MLPMemory(*layers)
        return TitansState(memory, recent, torch.zeros(batch_size, device=self.device, dtype=torch.int64))

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        config = self.config
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        biased = config.inner == "mlp"
        per_head = titans_flops(paradigm, length, self.widths, config.mini_batch, context, biased=biased)
        return 2 * length * weights + config.n_heads * per_head
