"""Base classes of mixers whose state is a matrix per head: those of the decay and delta families."""

from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from ...ops.decay import DECAY, Backend
from ...ops.recurrence.family import Family
from ...ops.runtime.call import CHUNK_SIZE, Call
from ...ops.runtime.kernel import Probe
from ...ops.runtime.paradigm import Paradigm
from ..base.contract import MixerConfig, SequenceMixer
from ..base.traits import Traits
from .short_convolution import ShortConvolution
from .token_shift import TokenShift

Chunk = Annotated[int, Field(gt=0, le=2**20, description="Chunk length in tokens; changes the cost, never the result.")]
ShortConv = Annotated[
    int | None,
    Field(
        ge=0,
        le=64,
        examples=[2, None],
        description="Width in tokens of the short convolution before the recurrence; 0 or null for none.",
    ),
]


class MatrixStateConfig(MixerConfig):
    """Fields of every mixer whose state is a matrix per head."""

    family: ClassVar[Family] = DECAY
    """Op family of the recurrence."""
    norm_eps: float = Field(default=1e-6, ge=0)
    """Constant added to the variance or the mean square in the output norm."""
    chunk_size: Chunk = CHUNK_SIZE
    backend: Backend = "auto"
    """Kernel backend of the chunkwise paradigm and of decoding steps; changes the cost, never the result."""
    paradigm: Paradigm = Field(default=Paradigm.CHUNKWISE, strict=False)
    """Paradigm of training and evaluation."""

    @property
    def traits(self) -> Traits:
        """Traits: the paradigms of the op family, a constant state, no dependence on absolute position."""
        return Traits(paradigms=self.family.paradigms, state="constant", packing=True, shift_invariant=True)


class MatrixState(NamedTuple):
    """State of a mixer after a prefix: a matrix per head."""

    memory: Float[Tensor, "B H K V"]
    """State matrix S of each head, float32 or float64."""
    recent: Float[Tensor, "B W-1 C"]
    """Last inputs of the short convolution, oldest first; empty without a short convolution."""
    position: Int[Tensor, " B"]
    """Number of tokens processed."""


class MatrixStateMixer(SequenceMixer[MatrixState]):
    """A mixer whose state is a matrix per head, updated by an op of the configuration's family.

    A subclass sets `n_heads`, `key_dim`, `value_dim` (the sizes of the state) and `convolution`, and defines `mix`.
    """

    supports_context_parallel = True
    log_decay_shape: Literal["H", "B T H", "B T H K"] | None = None
    """Dimensions of the log-decays; None without decay."""
    silu_without_conv: ClassVar[bool] = False
    """True to apply silu to the projections even if there is no short convolution, which normally applies it."""
    steps: int = 1
    """Number of steps of the recurrence per token."""
    wide_output: bool = False
    """True if the op returns float32 for 16-bit inputs, because the mixer divides the output by a normaliser before it
    rounds it."""
    n_heads: int
    key_dim: int
    value_dim: int
    convolution: ShortConvolution | TokenShift | None

    def __init__(self, config: MatrixStateConfig) -> None:
        super().__init__(config)
        self.family = config.family
        self.convolution = None

    def convolve(self, x: Float[Tensor, "B T C"], call: Call) -> tuple[Tensor, Tensor | None]:
        """Return the short convolution of x, and the leaf `recent` of the final state (None unless requested)."""
        if self.convolution is not None:
            return self.convolution(x, call.enter("recent"))
        x = F.silu(x) if self.silu_without_conv else x
        if call.state is not None:
            return x, call.state.recent if call.return_state else None
        return x, x.new_zeros(call.rows(x.shape[0]), 0, 0, dtype=self.dtype) if call.return_state else None

    def state_after(self, x: Tensor, memory: Tensor | None, recent: Tensor | None, call: Call) -> MatrixState | None:
        """Return the state after the segment x; None unless requested."""
        if memory is None or recent is None:
            return None
        return MatrixState(memory, recent, call.advance(x, None if call.state is None else call.state.position))

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> MatrixState:
        del max_length
        memory = (batch_size, self.n_heads, self.key_dim, self.value_dim)
        if self.convolution is None:
            recent = torch.zeros(batch_size, 0, 0, device=self.device, dtype=self.dtype)
        else:
            recent = self.convolution.init_state(batch_size)
        position = torch.zeros(batch_size, device=self.device, dtype=torch.int64)
        return MatrixState(torch.zeros(memory, device=self.device, dtype=self.state_dtype), recent, position)

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        weights = sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))
        widths = (self.key_dim, self.value_dim)
        options: dict[str, int] = {"key_decays": True} if self.log_decay_shape == "B T H K" else {}
        options |= {"steps": self.steps} if self.steps > 1 else {}
        per_head = self.family.flops(paradigm, length, *widths, chunk_size=self.chunk_size, context=context, **options)
        return 2 * length * weights + self.n_heads * per_head

    def kernels(self, dtype: torch.dtype) -> tuple[str, Probe]:
        return self.family.name, Probe(
            device=self.device,
            dtype=self.op_dtype(dtype),
            key_width=self.key_dim,
            value_width=self.value_dim,
            log_decay=self.log_decay_shape,
            wide_output=self.wide_output,
        )

    def op_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the inputs of the recurrence, if the projections have `dtype`."""
        # kernels store the states between chunks in the input dtype, and sums of many tokens overflow in float16
        return torch.float32 if self.wide_output and dtype == torch.float16 else dtype
