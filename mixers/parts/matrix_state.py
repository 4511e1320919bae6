"""A matrix per head as the state: what every mixer of the decay and delta families has, whatever its projections."""

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
from ..contract import MixerConfig, SequenceMixer
from ..traits import Traits
from .short_convolution import ShortConvolution
from .token_shift import TokenShift

Chunk = Annotated[int, Field(gt=0, le=2**20, description="Chunk length in tokens; changes the cost, never the result.")]
ShortConv = Annotated[
    int | None,
    Field(
        ge=0,
        le=64,
        examples=[2, None],
        description="Tokens that the short convolution before the recurrence sees; 0 or null for none.",
    ),
]


class MatrixStateConfig(MixerConfig):
    """Fields of every mixer whose state is a matrix per head."""

    deprecated_names: ClassVar = {"conv_size": "short_conv"}
    family: ClassVar[Family] = DECAY
    """The op family."""
    value_residual: ClassVar[bool] = False
    """Whether layers give their values to later ones."""
    norm_eps: float = Field(default=1e-6, ge=0)
    """Added to the variance or the mean square of the output's norm."""
    chunk_size: Chunk = CHUNK_SIZE
    backend: Backend = "auto"
    """The kernel backend of the chunkwise paradigm, and of decoding steps; changes the cost, never the result."""
    paradigm: Paradigm = Field(default=Paradigm.CHUNKWISE, strict=False)
    """The paradigm of training and evaluation."""

    @property
    def traits(self) -> Traits:
        """The family's paradigms; positions do not matter, or only distances do."""
        return Traits(
            paradigms=self.family.paradigms,
            state="constant",
            packing=True,
            shift_invariant=True,
            value_residual=self.value_residual,
        )


class MatrixState(NamedTuple):
    """The state after a prefix."""

    memory: Float[Tensor, "B H K V"]
    """S, float32 or float64."""
    recent: Float[Tensor, "B W-1 C"]
    """The last inputs of the short convolution, oldest first; empty without one."""
    position: Int[Tensor, " B"]
    """Tokens processed."""


class MatrixStateMixer(SequenceMixer[MatrixState]):
    """A mixer of a family of recurrences.

    A subclass sets `n_heads`, `key_dim` and `value_dim` (of the state), `convolution`, and writes `mix`.
    """

    supports_context_parallel = True
    log_decay_shape: Literal["H", "B T H", "B T H K"] | None = None
    """The dimensions of its log-decays; None where nothing decays."""
    silu: ClassVar[bool] = False
    """Whether silu takes the place of a short convolution that is switched off, as it follows one."""
    steps: int = 1
    """Steps of the recurrence per token."""
    wide_output: bool = False
    """Whether the op's output is wide, of 16-bit inputs: where a quotient of it is what may be narrow."""
    n_heads: int
    key_dim: int
    value_dim: int
    convolution: ShortConvolution | TokenShift | None

    def __init__(self, config: MatrixStateConfig) -> None:
        super().__init__(config)
        self.family = config.family
        self.convolution = None

    def convolve(self, x: Float[Tensor, "B T C"], call: Call) -> tuple[Tensor, Tensor | None]:
        """The short convolution of x, and its last inputs if they are wanted: the leaf `recent` of the state."""
        if self.convolution is not None:
            return self.convolution(x, call.enter("recent"))
        x = F.silu(x) if self.silu else x
        if call.state is not None:
            return x, call.state.recent if call.return_state else None
        return x, x.new_zeros(call.rows(x.shape[0]), 0, 0, dtype=self.dtype) if call.return_state else None

    def state_after(self, x: Tensor, memory: Tensor | None, recent: Tensor | None, call: Call) -> MatrixState | None:
        """The state after the segment x, if it is wanted."""
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
        """The dtype of the op's inputs where the projections have `dtype`."""
        # kernels store states between chunks as narrow as inputs: in float16 sums of many tokens overflow there
        return torch.float32 if self.wide_output and dtype == torch.float16 else dtype
