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

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from ..ops.ttt import TTT_PARADIGMS, FastLayer, Norm, ttt, ttt_flops
from .base.contract import MixerConfig, SequenceMixer
from .base.roles import Role, RowBlock
from .base.traits import ContractError, Traits
from .parts import Call, Paradigm, ShortConv, ShortConvolution, head_width, rotated
from .parts.projections import projections_of
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
        """Traits: primal and dual form, and a constant state whose mini-batches depend on the position."""
        return Traits(
            paradigms=TTT_PARADIGMS,
            state="constant",
            packing=True,
            # with mini-batches of one token there are no places in them
            shift_invariant=self.mini_batch == 1,
        )

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "TTT":
        return TTT(self, d_model)


class LinearMemory(NamedTuple):
    """Network in the state of `inner: linear`."""

    output: FastLayer


class MLPMemory(NamedTuple):
    """Network in the state of `inner: mlp`."""

    hidden: FastLayer
    output: FastLayer


class TTTState(NamedTuple):
    """State of a TTT layer after a prefix."""

    memory: LinearMemory | MLPMemory
    """Network in the state, float32 or float64."""
    recent: Float[Tensor, "B W-1 C"]
    """Last inputs of the short convolution, oldest first; empty without a short convolution."""
    position: Int[Tensor, " B"]
    """Number of tokens processed; the place in the mini-batch is its remainder."""


class TTT(SequenceMixer[TTTState]):
    """Layer configured by `TTTConfig`."""

    def __init__(self, config: TTTConfig, d_model: int) -> None:
        super().__init__(config)
        self.config = config
        heads = config.n_heads
        width = head_width(d_model, 1.0, heads, "1")
        if width % 2:
            raise ContractError(f"ttt rotates pairs of dimensions and needs heads of even width, got {width}")
        self.widths = [width, width] if config.inner == "linear" else [width, 4 * width, width]
        self.base_rate = config.base_rate or (1.0 if config.inner == "linear" else 0.1)
        self.row_blocks = [RowBlock(name, d_model, heads=heads) for name in "qkv"]
        self.row_blocks.append(RowBlock("rate", heads, Role.GATE))
        self.in_proj = nn.Linear(d_model, 3 * d_model + heads, bias=False)
        self.rate_bias = nn.Parameter(torch.empty(heads))
        self.step_factor = nn.Parameter(torch.empty(config.mini_batch))
        self.convolution = ShortConvolution.of(config.short_conv, 3 * d_model)
        shapes = pairwise(self.widths)
        self.initial_weights = nn.ParameterList(nn.Parameter(torch.empty(heads, *shape)) for shape in shapes)
        self.initial_biases = nn.ParameterList(nn.Parameter(torch.empty(heads, 1, n)) for n in self.widths[1:])
        self.inner_norm_weight = nn.Parameter(torch.empty(heads, width))
        self.inner_norm_bias = nn.Parameter(torch.empty(heads, width))
        self.norm = nn.LayerNorm(d_model, eps=config.norm_eps)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.parameter_roles = {
            "in_proj.weight": self.row_blocks,
            "rate_bias": Role.RATE,
            "step_factor": Role.RATE,
            "inner_norm_weight": Role.NORM,
            "inner_norm_bias": Role.NORM,
            **{f"initial_weights.{n}": Role.VECTOR for n in range(len(self.initial_weights))},
            **{f"initial_biases.{n}": Role.VECTOR for n in range(len(self.initial_biases))},
        }
        self.initial_std = 0.02
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the authors' code: normal matrices with a standard deviation of 0.02, biases of 0.

        muP scales the deviation.
        """
        for matrix in (self.in_proj.weight, self.out_proj.weight, *self.initial_weights):
            nn.init.normal_(matrix, std=self.initial_std)
        for bias in (self.rate_bias, self.step_factor, self.inner_norm_bias, *self.initial_biases):
            nn.init.zeros_(bias)
        nn.init.ones_(self.inner_norm_weight)
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

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], TTTState | None]:
        config, wide = self.config, self.state_dtype
        heads = config.n_heads
        qkv, rate = self.in_proj(x).split([3 * x.shape[-1], heads], dim=-1)
        state = self.init_state(call.rows(x.shape[0])) if call.state is None else call.state
        recent = state.recent
        if self.convolution is not None:
            qkv, recent = self.convolution(qkv, call.enter("recent"))
        qk, v = qkv.unflatten(-1, (3 * heads, -1)).split([2 * heads, heads], dim=2)
        positions = call.positions(x, None if call.state is None else state.position) % config.mini_batch
        q, k = rotated(qk, positions, "rope", config.rotation_base).chunk(2, dim=2)
        rate = self.base_rate / self.widths[0] * (rate.to(wide) + self.rate_bias.to(wide)).sigmoid()
        place = torch.arange(1, config.mini_batch + 1, device=x.device, dtype=wide)
        factor = (1 / place + self.step_factor.to(wide)).clamp(min=0)
        norm = Norm(self.inner_norm_weight, self.inner_norm_bias, config.norm_eps)
        o, layers = ttt(q, k, v, rate, factor, state.memory, state.position, call, norm)
        y = self.out_proj(self.norm(o.flatten(2)))
        if layers is None:
            return y, None
        position = call.advance(x, None if call.state is None else state.position)
        return y, TTTState(state.memory._make(layers), recent, position)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> TTTState:
        del max_length
        layers = []
        for pair in zip(self.initial_weights, self.initial_biases, strict=True):
            weight, bias = (x.to(self.state_dtype).repeat(batch_size, 1, 1, 1) for x in pair)
            layers.append(FastLayer(weight, bias, torch.zeros_like(weight), torch.zeros_like(bias)))
        if self.convolution is None:
            recent = torch.zeros(batch_size, 0, 0, device=self.device, dtype=self.dtype)
        else:
            recent = self.convolution.init_state(batch_size)
        memory = LinearMemory(*layers) if self.config.inner == "linear" else MLPMemory(*layers)
        return TTTState(memory, recent, torch.zeros(batch_size, device=self.device, dtype=torch.int64))

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        config = self.config
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        per_head = ttt_flops(paradigm, length, self.widths, config.mini_batch, context)
        return 2 * length * weights + config.n_heads * per_head
