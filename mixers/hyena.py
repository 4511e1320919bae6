"""Hyena (Poli et al., arXiv 2302.10866, Definition 3.1, §3.2 and 3.3): long convolutions and gates, interleaved.

    v, x_1 .. x_N = conv(x W_I) by channel, over the last few tokens
    v   <-  x_n * (h_n conv v + b_n v)      for n = 1 .. N, the order
    y   =   v W_O
    h_n(t) = FFN_n(features(t / L)) * (exp(-delta t / L) + shift)       delta: one rate per channel
    features(s) = s, cos(2 pi k s), -sin(2 pi k s)      for k = 1 .. K      the FFN has sines between its layers

The filters are functions of the distance t in tokens, and are computed in every call. Their scale is the field
`filter_length`, L, not the length of the segment. The paper's filters end at L. Here they continue: the features keep
oscillating, s grows, and the window falls to its shift. So any length is allowed, but untrained lengths may give poor
results. Decoding sums over all inputs of the long convolutions, which are the state, so the cost of a step grows with
its position. In the parallel paradigm, later tokens affect earlier ones through the rounding of FFTs, and an inf or nan
spreads to all tokens of its sequence.

Differences from the authors' code: it has one filter fewer than the paper (`first_filter` selects either), biases in
the projections, dropout, k from 0 to K - 1 (k = 0 carries no information), s = t / (L - 1), and rates that are spread
over all filters together instead of over each. Its features are learned, with their own learning rate, and its runs use
sine frequencies of 14 or 10. As in the authors' code, all filters share one FFN except for its last layer, and all
layers of the FFN share the frequencies of the sines.
"""

import math
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..ops.convolution import long_convolution
from ..ops.runtime.call import Call
from ..ops.runtime.packing import require_async
from ..ops.runtime.paradigm import Paradigm
from .base.contract import MixerConfig, SequenceMixer
from .base.roles import Role, RowBlock
from .base.traits import Traits, require_capacity
from .parts import ShortConvolution

DECAYED_WINDOW = 0.01
"""Value to which the exponential window of a filter falls at the distances in `decay_range`."""


class HyenaConfig(MixerConfig):
    """Hyena: gates alternate with convolutions over all tokens, whose filters are functions of the distance."""

    kind: Literal["hyena"] = "hyena"
    order: int = Field(default=2, gt=0, le=4, examples=[1, 3])
    """Number of gates, each applied after a long convolution."""
    first_filter: bool = True
    """True for a long convolution before the first gate, as in the paper; the authors' code has none."""
    short_conv: int = Field(default=3, gt=0, le=64, examples=[1])
    """Width in tokens of the short convolution of the projections."""
    filter_length: int = Field(default=1024, gt=0, le=2**40, examples=[5])
    """Length L in tokens that the filters are scaled for; longer sequences are allowed."""
    n_bands: int = Field(default=16, gt=0, le=2**16, examples=[2, 1])
    """Number K of feature frequencies, from 1 to K periods in L tokens."""
    filter_width: int = Field(default=64, gt=0, le=2**20, examples=[4])
    """Hidden width of the FFN that computes the filters."""
    filter_depth: int = Field(default=4, ge=2, le=64, examples=[2, 3])
    """Number of linear layers of the FFN that computes the filters."""
    sine_frequency: float = Field(default=1.0, gt=0, le=1e3)
    """Initial frequency of the sines in the FFN; each hidden dimension learns its own. Larger values give rougher
    filters, and gradients of the first layers that grow with powers of the frequency."""
    decay_range: tuple[float, float] = Field(default=(0.3, 1.5), strict=False)
    """Fractions of L at which the windows of the fastest and the slowest channel fall to 0.01; from 1e-6 to 1e6."""
    decay_shift: float = Field(default=0.05, ge=0, le=1)
    """Constant added to the exponential windows of the filters, so that they never fall to 0."""
    paradigm: Paradigm = Field(default=Paradigm.PARALLEL, strict=False)
    """Paradigm of training and evaluation."""

    @model_validator(mode="after")
    def _check_options(self) -> "HyenaConfig":
        if self.order == 1 and not self.first_filter:
            raise ValueError("first_filter = false needs order >= 2, got order = 1, which would have no filter")
        fast, slow = self.decay_range
        if not 1e-6 <= fast <= slow <= 1e6:
            raise ValueError(f"decay_range expects 1e-06 <= fastest <= slowest <= 1e+06, got {self.decay_range}")
        return self

    @property
    def traits(self) -> Traits:
        """Traits: no chunkwise paradigm, a growing state, no dependence on absolute position."""
        return Traits(
            paradigms=frozenset({Paradigm.PARALLEL, Paradigm.RECURRENT}),
            state="growing",
            packing=True,
            shift_invariant=True,
        )

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "Hyena":
        return Hyena(self, d_model)


class GrowingHyenaState(NamedTuple):
    """Growing state of Hyena after a prefix. A segment, or a packed row, of T tokens adds T entries to every row."""

    recent: Float[Tensor, "B W-1 D*(N+1)"]
    """Last inputs of the short convolution, oldest first."""
    inputs: Float[Tensor, "B P N D"]
    """All inputs of each long convolution, oldest first; rows with fewer than P tokens are left-padded with zeros."""


class AllocatedHyenaState(NamedTuple):
    """State of Hyena after a prefix, preallocated for P tokens."""

    recent: Float[Tensor, "B W-1 D*(N+1)"]
    inputs: Float[Tensor, "B P N D"]
    length: Int[Tensor, " B"]
    """Number of tokens processed."""


HyenaState: TypeAlias = GrowingHyenaState | AllocatedHyenaState


class Hyena(SequenceMixer[HyenaState]):
    """Layer configured by `HyenaConfig`."""

    supports_context_parallel = True

    def __init__(self, config: HyenaConfig, d_model: int) -> None:
        super().__init__(config)
        self.config = config
        self.d_model = d_model
        self.n_filters = config.order - (not config.first_filter)
        streams = (config.order + 1) * d_model
        width = config.filter_width
        self.in_proj = nn.Linear(d_model, streams, bias=False)
        self.convolution = ShortConvolution(streams, config.short_conv, bias=True, activation="none")
        streams_of = [RowBlock(f"stream_{n}", d_model) for n in range(config.order + 1)]
        self.parameter_roles = {
            "in_proj.weight": streams_of,
            # the network that computes the filters; not decayed, as in the authors' code
            **{f"filter_layers.{n}.weight": Role.CONVOLUTION for n in range(config.filter_depth - 1)},
            "filter_out.weight": Role.CONVOLUTION,
            "skip": Role.VECTOR,
        }
        widths = [1 + 2 * config.n_bands, *[width] * (config.filter_depth - 1)]
        self.filter_layers = nn.Sequential(*(nn.Linear(*sizes) for sizes in pairwise(widths)))
        self.filter_out = nn.Linear(width, self.n_filters * d_model, bias=False)
        self.frequency = nn.Parameter(torch.empty(width))
        self.skip = nn.Parameter(torch.empty(self.n_filters, d_model))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the authors' code: torch's defaults for linear layers and convolutions, a normal b."""
        for layer in (self.in_proj, self.convolution, *self._filter_layers(), self.filter_out, self.out_proj):
            layer.reset_parameters()
        nn.init.constant_(self.frequency, self.config.sine_frequency)
        nn.init.normal_(self.skip)

    def mix(self, x: Float[Tensor, "B T D"], call: Call) -> tuple[Float[Tensor, "B T D"], HyenaState | None]:
        state = call.state
        length = x.shape[1] * (1 if call.cp_group is None else call.cp_group.size)
        streams, recent = self.convolution(self.in_proj(x), call.enter("recent"))
        v, *gates = streams.to(self.state_dtype).chunk(self.config.order + 1, dim=-1)  # products leave 16 bits' range
        allocated = isinstance(state, AllocatedHyenaState)
        capacity = 0 if state is None else state.inputs.shape[1]
        # tokens must fit into an allocated state only if a final state is returned
        must_fit = allocated and call.return_state
        filters = (call.once(self.filters, capacity) if must_fit else self.filters(capacity + length)).unbind()
        inputs = []
        for n, gate in enumerate(gates, start=self.n_filters - self.config.order):
            if n >= 0:  # the first gate has no filter if first_filter is False
                before = None if state is None else state.inputs[:, :, n]
                v, past_inputs = long_convolution(v, filters[n], call._replace(state=before), grows=not allocated)
                inputs.append(past_inputs)
            v = gate * v
        y = self.out_proj(v.to(streams.dtype))
        if not call.return_state:
            return y, None
        after = torch.stack(inputs, dim=2)
        if not isinstance(state, AllocatedHyenaState):
            return y, GrowingHyenaState(recent, after)
        processed = call.advance(x, state.length)
        require_async(
            (processed <= capacity).all(),
            "the state was allocated for fewer tokens: pass a larger max_length to init_state",
        )
        return y, AllocatedHyenaState(recent, after, processed)

    def filters(self, length: int) -> Float[Tensor, "N D length"]:
        """Return the filters h_n at distances from 0 to length - 1 tokens, with b_n added at distance 0; float64.

        In float32, nested sines would amplify one rounding error a thousandfold. Autocast also leaves float64 alone.
        """
        config = self.config
        exact = torch.float64
        s = torch.arange(length, device=self.device, dtype=exact)[:, None] / config.filter_length
        angles = 2 * math.pi * s * torch.arange(1, config.n_bands + 1, device=self.device, dtype=exact)
        hidden = torch.cat((s, angles.cos(), -angles.sin()), dim=1)
        for layer in self._filter_layers():
            hidden = torch.sin(
                self.frequency.to(exact) * F.linear(hidden, layer.weight.to(exact), layer.bias.to(exact))
            )
        filters = F.linear(hidden, self.filter_out.weight.to(exact)).unflatten(1, (self.n_filters, -1))
        fast, slow = (-math.log(DECAYED_WINDOW) / part for part in config.decay_range)
        rates = torch.linspace(slow, fast, self.d_model, device=self.device, dtype=exact)
        window = torch.exp(-s * rates) + config.decay_shift
        filters = filters * window[:, None] + (s == 0)[:, None] * self.skip.to(exact)
        return filters.permute(1, 2, 0)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> HyenaState:
        recent = self.convolution.init_state(batch_size)
        sizes = (batch_size, max_length or 0, self.n_filters, self.d_model)
        inputs = torch.zeros(sizes, device=self.device, dtype=self.state_dtype)
        if max_length is None:
            return GrowingHyenaState(recent, inputs)
        return AllocatedHyenaState(recent, inputs, torch.zeros(batch_size, device=self.device, dtype=torch.int64))

    def resize_state(self, state: HyenaState, max_length: int | None) -> HyenaState:
        entries = state.inputs.shape[1]
        # a growing state does not count its tokens, so the leading zeros of padded rows are not counted
        length = (
            state.length
            if isinstance(state, AllocatedHyenaState)
            else (state.inputs.flatten(2).any(-1).cumsum(1) > 0).sum(1)
        )
        processed = int(length.max())
        require_capacity(processed, max_length, self.kind)
        inputs = state.inputs[:, entries - processed :]
        if max_length is None:
            return GrowingHyenaState(state.recent, inputs)
        return AllocatedHyenaState(state.recent, F.pad(inputs, (0, 0, 0, 0, max_length - processed, 0)), length)

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        projections = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        filter_weights = sum(layer.weight.numel() for layer in (*self._filter_layers(), self.filter_out))
        return 2 * (length * projections + (context + length) * filter_weights)

    def _filter_layers(self) -> list[nn.Linear]:
        """Return the layers of the filters' FFN except for the last."""
        # the cast is safe: an adapter is not an nn.Linear, but has the attributes of one
        return cast("list[nn.Linear]", list(self.filter_layers))
