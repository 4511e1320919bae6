"""One value describes a call: everything that travels beside the tensors of a segment, from a mixer to its op."""

from typing import Any, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from .context_parallel import ContextParallel
from .once import once
from .packing import Documents, advance, token_positions
from .paradigm import Paradigm


class Call(NamedTuple):
    """How one segment is mixed: immutable, and made once, by `SequenceMixer.forward`."""

    paradigm: Paradigm
    state: Any = None
    """What came before the segment: a mixer's state, or the leaf of it that an op reads; None means nothing."""
    documents: Documents | None = None
    """Those of a packed row."""
    return_state: bool = False
    """Whether the state after the segment is wanted."""
    chunk_size: int = 128
    """Tokens per chunk of the chunkwise paradigm; changes the cost, never the result."""
    backend: str = "reference"
    """The kernel backend; changes the cost, never the result."""
    cp_group: ContextParallel | None = None
    """The processes that share the row of tokens, one segment each; documents and state are those of the whole row."""
    first_values: Float[Tensor, "B T D"] | None = None
    """The values of the model's first layer with a value residual, of the same tokens; None where there are none."""

    @classmethod
    def of(
        cls,
        paradigm: Paradigm | str,
        length: int,
        initial_state: Any = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        chunk_size: int = 128,
        backend: str = "reference",
    ) -> "Call":
        """The call of an op by itself on `length` tokens, in the words of fla and flash-attn.

        Args:
            paradigm: how it is computed.
            length: T.
            initial_state: what came before the first token; None means nothing.
            output_final_state: whether the state after the last token is wanted.
            cu_seqlens: boundaries of N documents packed into one row (B = 1); states then have N rows. Empty ones are
                legal.
            chunk_size: tokens per chunk of the chunkwise paradigm; changes the cost, never the result.
            backend: the kernel backend; changes the cost, never the result.

        Raises:
            SeqmixError: the paradigm does not exist; the boundaries do not rise from 0 to `length`.
        """
        documents = Documents.of(cu_seqlens, length)
        return cls(Paradigm.named(paradigm), initial_state, documents, output_final_state, chunk_size, backend)

    def enter(self, leaf: str) -> "Call":
        """The call of an op that reads one leaf of the mixer's state."""
        return self if self.state is None else Call(self.paradigm, getattr(self.state, leaf), *self[2:])

    @property
    def cu_seqlens(self) -> Int[Tensor, "N+1"] | None:
        """The documents' boundaries."""
        return None if self.documents is None else self.documents.cu_seqlens

    def rows(self, batch_size: int) -> int:
        """Rows of a state: of the batch, or one per document."""
        return batch_size if self.documents is None else self.documents.number

    def positions(self, x: Tensor, offset: Int[Tensor, " N"] | None) -> Int[Tensor, "_ T"]:
        """The positions of the tokens of x [B T ..] after `offset` tokens of each row or document (None: none)."""
        length = x.shape[1]
        start = 0 if self.cp_group is None else self.cp_group.start(length)
        if self.documents is None:
            return once(token_positions, length, offset, None, x.device, start)
        return token_positions(length, offset, self.documents, x.device, start)

    def advance(self, x: Tensor, offset: Int[Tensor, " N"] | None) -> Int[Tensor, " N"]:
        """Tokens read once x [B T ..] is read, by row or document."""
        size = 1 if self.cp_group is None else self.cp_group.size
        return advance(offset, x.shape[0], size * x.shape[1], self.documents, x.device)
