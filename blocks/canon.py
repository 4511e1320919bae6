"""Canon layers: short convolutions with a residual connection, between the parts of a block (arXiv 2512.17351).

    x_t <- x_t + sum_{i<4} w_i * x_{t-i}        by channel, without bias and activation

    a    the input of the mixer, after the norm
    c    the input of the feed-forward network, after the norm
    d    the hidden layer of the feed-forward network, before its activation; gate and values of a gated network

The paper's b, on queries, keys and values, is left out: many mixers have a short convolution there (`short_conv`). The
filters start uniformly in (-1/2, 1/2), as in the authors' code (facebookresearch/PhysicsLM4), so the start is not the
identity. The last three inputs of each layer are state.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from jaxtyping import Float
from torch import Tensor, nn

from ..mixers import ContractError
from ..mixers.base.layer_call import LayerCall
from ..mixers.parts import Call, Paradigm, ShortConvolution
from ..ops.runtime.context_parallel import ContextParallel
from ..ops.runtime.packing import Documents

Place: TypeAlias = Literal["a", "c", "d"]
KERNEL = 4
"""Tokens of a filter, the token itself included."""


class CanonState(NamedTuple):
    """State of a block with Canon layers."""

    mixer: Any
    """State of the mixer."""
    canon: tuple[Float[Tensor, "N 3 _"], ...]
    """Last inputs of each Canon layer, oldest first, in the order of the places."""


class Canon(nn.Module):
    """Canon layers of a block.

    Args:
        widths: number of channels by place.
    """

    def __init__(self, widths: Mapping[Place, int]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {place: ShortConvolution(width, KERNEL, activation="none") for place, width in sorted(widths.items())}
        )

    @property
    def convolutions(self) -> dict[str, ShortConvolution]:
        """Convolutions by place, in the order of the places."""
        return cast("dict[str, ShortConvolution]", dict(self.layers.items()))

    def reset_parameters(self) -> None:
        """Initialise uniformly within 1/sqrt(4), as `nn.Conv1d` does."""
        for layer in self.convolutions.values():
            layer.reset_parameters()

    def init_state(self, mixer_state: Any, batch_size: int) -> CanonState:
        """Return the initial state of the block."""
        return CanonState(mixer_state, tuple(layer.init_state(batch_size) for layer in self.convolutions.values()))


class CanonCall:
    """Canon layers applied to one segment: by place, and only where the block has one.

    Args:
        canon: the layers.
        call: the call of the block.
        cp_group: processes that share the sequence.
    """

    def __init__(self, canon: Canon, call: LayerCall, cp_group: ContextParallel | None) -> None:
        state = call.state
        if state is not None and not isinstance(state, CanonState):
            raise ContractError(
                f"a block with canon expects a CanonState, got a {type(state).__name__}: use the state of this model"
            )
        self.layers = canon.convolutions
        self._before = {} if state is None else dict(zip(self.layers, state.canon, strict=True))
        self._after: dict[str, Tensor] = {}
        self._call = call
        self._cp_group = cp_group

    @property
    def mixer_call(self) -> LayerCall:
        """Call of the block's mixer, with the mixer's part of the state."""
        return self._call if self._call.state is None else self._call._replace(state=self._call.state.mixer)

    def __call__(self, place: Place, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """Return x plus its convolution, or x if the block has no layer at this place."""
        if place not in self.layers:
            return x
        length = x.shape[1]
        cp = self._cp_group
        start, total = (0, length) if cp is None else (cp.start(length), cp.size * length)
        cu_seqlens = self._call.cu_seqlens
        documents = None if cu_seqlens is None else Documents.of(cu_seqlens, length, start, total)
        before, return_state = self._before.get(place), self._call.return_state
        call = Call(Paradigm.PARALLEL, before, documents, return_state=return_state, cp_group=cp)
        y, after = self.layers[place](x, call)
        if after is not None:
            self._after[place] = after
        return x + y

    def feed(self, ffn: Any, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Return the feed-forward network of x, with the Canon layers before it and on its hidden layer."""
        x = self("c", x)
        return ffn(x, partial(self, "d")) if "d" in self.layers else ffn(x)

    def state_after(self, mixer_state: Any) -> CanonState:
        """Return the state of the block after the segment."""
        return CanonState(mixer_state, tuple(self._after[place] for place in self.layers))
