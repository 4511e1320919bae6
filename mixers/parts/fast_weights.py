"""Base of mixers whose state is a small network that is trained while it reads (fast weights, test-time training).

    q, k, v  = conv(x W_Q, x W_K, x W_V) by head
    W_t      = the weights after gradient descent on |f(k_j) - v_j|^2, j <= t; W_0 is learned
    y        = a norm of f_{W_t}(q_t), times W_O

f is linear, or has two layers with a hidden layer of 4 times the width. A mini-batch of `mini_batch` tokens is a part
of the definition: its tokens take gradients at the same weights, and a document starts one.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...ops.runtime.call import Call
from ...ops.runtime.paradigm import Paradigm
from ...ops.ttt import TTT_PARADIGMS
from ..base.contract import SequenceMixer
from ..base.roles import Role, RowBlock
from ..base.traits import Traits
from .projections import projections_of
from .short_convolution import ShortConvolution
from .widths import head_width


def fast_weight_traits(mini_batch: int) -> Traits:
    """Return the traits: primal and dual form, and a constant state whose mini-batches depend on the position."""
    return Traits(
        paradigms=TTT_PARADIGMS,
        state="constant",
        packing=True,
        # with mini-batches of one token there are no places in them
        shift_invariant=mini_batch == 1,
    )


class LinearMemory(NamedTuple):
    """Network in the state of `inner: linear`: a `FastLayer`, or a `MomentumLayer`."""

    output: Any


class MLPMemory(NamedTuple):
    """Network in the state of `inner: mlp`, with the same layers."""

    hidden: Any
    output: Any


class FastWeightState(NamedTuple):
    """State of a mixer with fast weights after a prefix."""

    memory: LinearMemory | MLPMemory
    """Network in the state, with what its optimizer keeps; float32 or float64."""
    recent: Float[Tensor, "B W-1 C"]
    """Last inputs of the short convolution, oldest first; empty without a short convolution."""
    position: Int[Tensor, " B"]
    """Number of tokens processed; the place in the mini-batch is its remainder."""


class FastWeightMixer(SequenceMixer[FastWeightState]):
    """Layer around a network that is trained in `learn`, which a subclass defines with the network's parameters.

    Args:
        config: the mixer's configuration, with n_heads, inner, mini_batch, base_rate and short_conv.
        d_model: width of the residual stream.
        vectors: names of the projections of width d_model; the first three are q, k and v.
        rates: names of the projections to one scalar per head.

    Raises:
        ContractError: the heads do not divide the width.
    """

    silu_without_conv: ClassVar[bool] = False
    """True if q, k and v go through a silu where there is no short convolution, which has its own."""
    norm: Any
    """Norm of the output, a module."""
    initial_weights: nn.ParameterList
    """Weights of the network before the first token, one matrix per layer and head."""

    def __init__(self, config: Any, d_model: int, *, vectors: Sequence[str], rates: Sequence[str]) -> None:
        super().__init__(config)
        self.config = config
        heads = config.n_heads
        width = head_width(d_model, 1.0, heads, "1")
        self.widths = [width, width] if config.inner == "linear" else [width, 4 * width, width]
        self.base_rate = config.base_rate or (1.0 if config.inner == "linear" else 0.1)
        self.row_blocks = [RowBlock(name, d_model, heads=heads) for name in vectors]
        self.row_blocks += [RowBlock(name, heads, Role.GATE) for name in rates]
        further = (len(vectors) - 3) * [d_model]
        self.split_widths = [3 * d_model, *further, len(rates) * heads]
        self.in_proj = nn.Linear(d_model, sum(self.split_widths), bias=False)
        self.convolution = ShortConvolution.of(config.short_conv, 3 * d_model)
        self.build_network(d_model)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.initial_std = 0.02
        self.reset_parameters()

    @abstractmethod
    def build_network(self, d_model: int) -> None:
        """Register the parameters of the network, of its optimizer and of the output norm; set `parameter_roles`."""

    @abstractmethod
    def learn(
        self,
        qk: Float[Tensor, "B T 2H K"],
        v: Float[Tensor, "B T H K"],
        others: Sequence[Tensor],
        state: FastWeightState,
        call: Call,
    ) -> tuple[Float[Tensor, "B T D"], Sequence[Any] | None]:
        """Train the network on keys and values, and read it with the queries.

        Args:
            qk: queries and keys, after the short convolution.
            v: values.
            others: further projections: one of width d_model for each of `vectors` after v, then those of all rates.
            state: the state before the segment.
            call: the call of `mix`.

        Returns:
            The vectors that the output projection reads, and the layers of the network after the segment (None unless
            requested).
        """

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the authors of TTT: normal matrices with a standard deviation of 0.02, which muP scales.

        A subclass initialises its rates, biases and inner norms.
        """
        for matrix in (self.in_proj.weight, self.out_proj.weight, *self.initial_weights):
            nn.init.normal_(matrix, std=self.initial_std)
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

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], FastWeightState | None]:
        heads = self.config.n_heads
        qkv, *others = self.in_proj(x).split(self.split_widths, dim=-1)
        state = self.init_state(call.rows(x.shape[0])) if call.state is None else call.state
        recent = state.recent
        if self.convolution is not None:
            qkv, recent = self.convolution(qkv, call.enter("recent"))
        elif self.silu_without_conv:
            qkv = nn.functional.silu(qkv)
        qk, v = qkv.unflatten(-1, (3 * heads, -1)).split([2 * heads, heads], dim=2)
        o, layers = self.learn(qk, v, others, state, call)
        y = self.out_proj(o)
        if layers is None:
            return y, None
        position = call.advance(x, None if call.state is None else state.position)
        return y, FastWeightState(state.memory._make(layers), recent, position)

    @abstractmethod
    def initial_layers(self, batch_size: int) -> Sequence[Any]:
        """Return the layers of the network before the first token, `batch_size` copies of each."""

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> FastWeightState:
        del max_length
        memory = LinearMemory if self.config.inner == "linear" else MLPMemory
        layers = self.initial_layers(batch_size)
        if self.convolution is None:
            recent = torch.zeros(batch_size, 0, 0, device=self.device, dtype=self.dtype)
        else:
            recent = self.convolution.init_state(batch_size)
        position = torch.zeros(batch_size, device=self.device, dtype=torch.int64)
        return FastWeightState(memory(*layers), recent, position)

    @abstractmethod
    def network_flops(self, length: int, paradigm: Paradigm, context: int) -> int:
        """Return the FLOPs of training and reading the network of one head; the arguments are those of `flops`."""

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        return 2 * length * weights + self.config.n_heads * self.network_flops(length, paradigm, context)
