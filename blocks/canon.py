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
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from jaxtyping import Float
from torch import Tensor, nn

from ..mixers import ContractError
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
        state: state of the block before the segment; None if no tokens came before.
        cu_seqlens: boundaries of packed documents.
        return_state: True if the state after the segment is wanted.
        cp_group: processes that share the sequence.
    """

    def __init__(
        self, canon: Canon, state: Any, cu_seqlens: Tensor | None, return_state: bool, cp_group: ContextParallel | None
    ) -> None:
        if state is not None and not isinstance(state, CanonState):
            raise ContractError(
                f"a block with canon expects a CanonState, got a {type(state).__name__}: use the state of this model"
            )
        self.layers = canon.convolutions
        self._before = {} if state is None else dict(zip(self.layers, state.canon, strict=True))
        self._after: dict[str, Tensor] = {}
        self._cu_seqlens = cu_seqlens
        self._return_state = return_state
        self._cp_group = cp_group

    def __call__(self, place: Place, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """Return x plus its convolution, or x if the block has no layer at this place."""
        if place not in self.layers:
            return x
        length = x.shape[1]
        cp = self._cp_group
        start, total = (0, length) if cp is None else (cp.start(length), cp.size * length)
        documents = None if self._cu_seqlens is None else Documents.of(self._cu_seqlens, length, start, total)
        call = Call(Paradigm.PARALLEL, self._before.get(place), documents, return_state=self._return_state, cp_group=cp)
        y, after = self.layers[place](x, call)
        if after is not None:
            self._after[place] = after
        return x + y

    def state_after(self, mixer_state: Any) -> CanonState:
        """Return the state of the block after the segment."""
        return CanonState(mixer_state, tuple(self._after[place] for place in self.layers))
