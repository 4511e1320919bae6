"""Base classes of mixers of the scan family, whose state is one or a few numbers per channel."""

import math
from typing import Any, ClassVar, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from ...ops.runtime.call import Call
from ...ops.runtime.kernel import Probe
from ...ops.runtime.paradigm import Paradigm
from ...ops.scan import SCAN_PARADIGMS, Backend
from ..base.contract import MixerConfig, SequenceMixer
from ..base.traits import Traits
from .matrix_state import Chunk
from .short_convolution import ShortConvolution


class ScanConfig(MixerConfig):
    """Fields of every mixer of the scan family."""

    chunk_size: Chunk = 64
    backend: Backend = "auto"
    """Kernel backend; changes the cost, never the result."""
    paradigm: Paradigm = Field(default=Paradigm.CHUNKWISE, strict=False)
    """Paradigm of training and evaluation."""

    @property
    def traits(self) -> Traits:
        """Traits: the paradigms of the scan family, a constant state, no dependence on position."""
        return Traits(paradigms=SCAN_PARADIGMS, state="constant", packing=True, shift_invariant=True)


class ScanState(NamedTuple):
    """State of a scan mixer after a prefix: one or a few numbers per channel."""

    memory: Float[Tensor, "B *E"]
    """State h of the recurrence, of sizes E, float32 or float64."""
    recent: Float[Tensor, "B W-1 C"]
    """Last inputs of the short convolution, oldest first; empty without a short convolution."""
    position: Int[Tensor, " B"]
    """Number of tokens processed."""


class ScanMixer(SequenceMixer[ScanState]):
    """A mixer of the scan family, whose state is a tensor [B *E] with one or a few numbers per channel.

    A subclass passes the sizes E to the constructor, sets `convolution` if it has one, and defines `mix`.
    """

    supports_context_parallel = True
    convolution: ShortConvolution | None
    op: ClassVar[str | None] = None
    """Name of the op of the recurrence; None if there is no choice of kernels."""
    products = 0
    """Number of multiplications per token in the matrix products that are not linear layers; `flops` counts them."""

    def __init__(self, config: Any, *memory_sizes: int) -> None:
        super().__init__(config)
        self.config = config
        self.memory_sizes = memory_sizes
        self.convolution = None

    def convolve(self, x: Float[Tensor, "B T C"], call: Call) -> tuple[Tensor, Tensor]:
        """Return the short convolution of x, and the leaf `recent` of the final state."""
        if self.convolution is not None:
            x, recent = self.convolution(x, call.enter("recent"))
        else:
            recent = None if call.state is None else call.state.recent
        return x, x.new_zeros(call.rows(x.shape[0]), 0, 0, dtype=self.dtype) if recent is None else recent

    def state_after(self, x: Tensor, memory: Tensor | None, recent: Tensor, call: Call) -> ScanState | None:
        """Return the state after the segment x; None unless requested."""
        if memory is None:
            return None
        return ScanState(memory, recent, call.advance(x, None if call.state is None else call.state.position))

    def reset_parameters(self) -> None:
        """Initialise each submodule by its own `reset_parameters`."""
        for part in cast("Any", self.children()):
            part.reset_parameters()

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        weights = sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))
        return 2 * length * (weights + self.products)

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> ScanState:
        del max_length
        if self.convolution is None:
            recent = torch.zeros(batch_size, 0, 0, device=self.device, dtype=self.dtype)
        else:
            recent = self.convolution.init_state(batch_size)
        memory = torch.zeros(batch_size, *self.memory_sizes, device=self.device, dtype=self.state_dtype)
        return ScanState(memory, recent, torch.zeros(batch_size, device=self.device, dtype=torch.int64))

    def kernels(self, dtype: torch.dtype) -> tuple[str, Probe] | None:
        if self.op is None:
            return None
        wide = torch.promote_types(dtype, torch.float32)  # mixers pass float32 even if projections have 16 bits
        *keys, channels = self.memory_sizes
        return self.op, Probe(device=self.device, dtype=wide, key_width=math.prod(keys), value_width=channels)
