"""One value describes a call: everything that travels beside the tensors of a segment, from a mixer to its op."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...registry import SeqmixError, nearest
from .context_parallel import ContextParallel
from .memo import Memo, once
from .packing import Documents, advance, token_positions
from .paradigm import Paradigm

R = TypeVar("R")


CHUNK_SIZE = 128
"""Default chunk length in tokens of the chunkwise paradigm."""


class CallOptions(TypedDict, total=False):
    """Keywords of an op that is called by itself, in the words of fla and flash-attn; a mixer passes a `Call` instead.

    An op's docstring gives the defaults that differ: its paradigm, and the chunk length in tokens.
    """

    initial_state: Any
    """State before the first token, N rows; None (the default) means nothing came before."""
    output_final_state: bool
    """True if the state after the last token is wanted; False by default."""
    cu_seqlens: Int[Tensor, "N+1"] | None
    """Boundaries of N documents packed into one row (B = 1); states then have N rows. Empty documents are legal."""
    paradigm: Paradigm | str
    """Parallel, recurrent or chunkwise; changes the cost, never the result."""
    chunk_size: int
    """Chunk length in tokens of the chunkwise paradigm; changes the cost, never the result."""
    backend: str
    """The kernel backend; changes the cost, never the result."""
    donate_state: bool
    """True if the final state may be written over the initial one; False by default, and ignored under grad."""


class Call(NamedTuple):
    """Everything that goes with a segment from a mixer to its op; immutable, made by `SequenceMixer.forward`."""

    paradigm: Paradigm
    state: Any = None
    """State before the segment, a mixer's or the leaf of it that an op reads; None means nothing came before."""
    documents: Documents | None = None
    """Documents of a packed row; None if the batch is not packed."""
    return_state: bool = False
    """True if the state after the segment is wanted."""
    chunk_size: int = CHUNK_SIZE
    """Tokens per chunk of the chunkwise paradigm; changes the cost, never the result."""
    backend: str = "reference"
    """The kernel backend; changes the cost, never the result."""
    cp_group: ContextParallel | None = None
    """The processes that share the row of tokens, one segment each; documents and state are those of the whole row."""
    first_values: Float[Tensor, "B T D"] | None = None
    """The values of the model's first layer with a value residual, of the same tokens; None where there are none."""
    donated: bool = False
    """True if the next state may be written over this one, which its owner does not need again; never under grad."""
    memo: Memo | None = None
    """Results that the layers of a model have in common, see `once`; None where nothing is shared."""

    @classmethod
    def of(
        cls,
        paradigm: Paradigm | str,
        length: int,
        initial_state: Any = None,
        output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,
        chunk_size: int = CHUNK_SIZE,
        backend: str = "reference",
        donate_state: bool = False,
    ) -> "Call":
        """The call of an op by itself on `length` tokens; the arguments are those of `CallOptions`.

        Raises:
            SeqmixError: the paradigm does not exist; the boundaries do not rise from 0 to `length`.
        """
        documents = Documents.of(cu_seqlens, length)
        return cls(
            Paradigm.named(paradigm),
            initial_state,
            documents,
            output_final_state,
            chunk_size,
            backend,
            donated=donate_state and not torch.is_grad_enabled(),
        )

    @classmethod
    def given(
        cls, call: "Call | None", length: int, options: CallOptions, *, paradigm: Paradigm, chunk_size: int = CHUNK_SIZE
    ) -> "Call":
        """The call that a mixer passed, or that of an op called by itself with `options` on `length` tokens.

        Args:
            call: a mixer's call, or None.
            length: T.
            options: the keywords of an op without a call.
            paradigm: the op's default.
            chunk_size: the op's default.

        Raises:
            SeqmixError: a call comes with options; an option does not exist; as of `Call.of`.
        """
        if call is not None:
            if options:
                raise SeqmixError(f"expected a call or options, got a call and {', '.join(options)}")
            return call
        for name in options:
            if name not in CallOptions.__annotations__:
                known = CallOptions.__annotations__
                raise SeqmixError(f"expected one of {', '.join(known)}, got {name}{nearest(name, known)}")
        defaults: CallOptions = {"paradigm": paradigm, "chunk_size": chunk_size}
        return cls.of(length=length, **(defaults | options))

    def enter(self, leaf: str) -> "Call":
        """The call of an op that reads one leaf of the mixer's state."""
        return self if self.state is None else self._replace(state=getattr(self.state, leaf))

    def once(self, function: Callable[..., R], *args: Any) -> R:
        """function(*args), computed once for all layers and steps that share this call's memo (`Memo.once`)."""
        return once(self.memo, function, *args)

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
            return self.once(token_positions, length, offset, None, x.device, start)
        return token_positions(length, offset, self.documents, x.device, start)

    def advance(self, x: Tensor, offset: Int[Tensor, " N"] | None) -> Int[Tensor, " N"]:
        """Tokens read once x [B T ..] is read, by row or document."""
        size = 1 if self.cp_group is None else self.cp_group.size
        return advance(offset, x.shape[0], size * x.shape[1], self.documents, x.device)
