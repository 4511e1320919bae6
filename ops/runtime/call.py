"""The call context: everything that a mixer passes to its op besides the tensors of a segment."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...registry import SeqmixError, choices_hint
from .context_parallel import ContextParallel
from .kernel import require_backend
from .memo import Memo
from .packing import Documents, advance, token_positions
from .paradigm import Paradigm

R = TypeVar("R")


CHUNK_SIZE = 128
"""Default chunk length in tokens of the chunkwise paradigm."""


class CallOptions(TypedDict, total=False):
    """Keywords of an op that is called directly, named as in fla and flash-attn; a mixer passes a `Call` instead.

    The docstring of each op states its default paradigm and its default chunk length.
    """

    initial_state: Any
    """State before the first token, N rows; None (the default) means that the sequence starts here."""
    output_final_state: bool
    """True to return the state after the last token; False by default."""
    cu_seqlens: Int[Tensor, "N+1"] | None
    """Boundaries of N documents packed into one row (B = 1); states then have N rows. Documents may be empty."""
    paradigm: Paradigm | str
    """Parallel, recurrent or chunkwise; changes the cost, never the result."""
    chunk_size: int
    """Chunk length in tokens of the chunkwise paradigm; changes the cost, never the result."""
    backend: str
    """The kernel backend; changes the cost, never the result."""
    donate_state: bool
    """True if the final state may overwrite the initial state; False by default, and ignored under grad."""


class Call(NamedTuple):
    """Context of one op call: all that a mixer passes besides tensors. Immutable, built by `SequenceMixer.forward`."""

    paradigm: Paradigm
    state: Any = None
    """State before the segment: the mixer's state, or after `enter` the leaf that the op reads; None at the start."""
    documents: Documents | None = None
    """Documents of a packed row; None if the batch is not packed."""
    return_state: bool = False
    """True to return the state after the segment."""
    chunk_size: int = CHUNK_SIZE
    """Tokens per chunk of the chunkwise paradigm; changes the cost, never the result."""
    backend: str = "reference"
    """The kernel backend; changes the cost, never the result."""
    cp_group: ContextParallel | None = None
    """Processes that share a row of tokens, one segment each; `documents` and `state` then describe the whole row."""
    first_values: Float[Tensor, "B T C"] | None = None
    """Values of the model's first layer of this kind, for the same tokens; None without a value residual."""
    token_values: Float[Tensor, "B T C"] | None = None
    """Vectors of the tokens that are added to the values; None without value embeddings."""
    shared_kv: Any = None
    """Keys and values of an earlier layer, for the same tokens; None in layers that have their own."""
    return_kv: bool = False
    """True to return the keys and values, for later layers."""
    return_loss: bool = False
    """True to return the auxiliary loss of a mixer or op that has one, summed over the tokens."""
    donated: bool = False
    """True if the next state may overwrite `state`, which its owner no longer needs; always False under grad."""
    memo: Memo | None = None
    """Cache of results that the layers of a model have in common, see `once`; None disables sharing."""

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
        """Build the call of an op that is called directly on `length` tokens; the arguments are those of `CallOptions`.

        Raises:
            SeqmixError: if the paradigm is unknown, or the boundaries do not rise from 0 to `length`.
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
    def resolve(
        cls,
        call: "Call | None",
        length: int,
        options: CallOptions,
        *,
        op: str,
        paradigm: Paradigm,
        chunk_size: int = CHUNK_SIZE,
    ) -> "Call":
        """Return the call of a mixer, or build one from the options of a direct call.

        Args:
            call: the mixer's call, or None if the op is called directly.
            length: number of tokens T.
            options: keywords of a direct call; must be empty if `call` is passed.
            op: name of the op, which may have kernels of several backends.
            paradigm: default paradigm of the op.
            chunk_size: default chunk length of the op, in tokens.

        Raises:
            SeqmixError: if a call comes with options, an option is unknown, or its value is invalid (see `Call.of`).
        """
        if call is not None:
            if options:
                raise SeqmixError(f"expected either a call or options, got a call and the options {', '.join(options)}")
            return call
        for name in options:
            if name not in CallOptions.__annotations__:
                known = CallOptions.__annotations__
                raise SeqmixError(f"unknown option {name!r}{choices_hint(name, known, 'options')}")
        if "backend" in options:
            require_backend(op, options["backend"])
        defaults: CallOptions = {"paradigm": paradigm, "chunk_size": chunk_size}
        return cls.of(length=length, **(defaults | options))

    @classmethod
    def given(cls, *args: Any, **kwargs: Any) -> "Call":
        """Deprecated name of `resolve`; it will be removed in 0.4."""
        warnings.warn("Call.given is now Call.resolve", DeprecationWarning, stacklevel=2)
        return cls.resolve(*args, **kwargs)

    def enter(self, leaf: str) -> "Call":
        """Return the call of an op that reads one leaf of the mixer's state."""
        return self if self.state is None else self._replace(state=getattr(self.state, leaf))

    def once(self, function: Callable[..., R], *args: Any) -> R:
        """Return function(*args), computed once for all layers and steps that share this call's memo (`Memo.once`)."""
        return function(*args) if self.memo is None else self.memo.once(function, *args)

    @property
    def cu_seqlens(self) -> Int[Tensor, "N+1"] | None:
        """Document boundaries; None if the batch is not packed."""
        return None if self.documents is None else self.documents.cu_seqlens

    def rows(self, batch_size: int) -> int:
        """Return the number of rows of a state: one per document if packed, else one per row of the batch."""
        return batch_size if self.documents is None else self.documents.number

    def positions(self, x: Tensor, offset: Int[Tensor, " N"] | None) -> Int[Tensor, "_ T"]:
        """Return the positions of the tokens of x [B T ..].

        `offset` is the number of tokens processed before, per row or document; None means 0.
        """
        length = x.shape[1]
        start = 0 if self.cp_group is None else self.cp_group.start(length)
        if self.documents is None:
            return self.once(token_positions, length, offset, None, x.device, start)
        return token_positions(length, offset, self.documents, x.device, start)

    def advance(self, x: Tensor, offset: Int[Tensor, " N"] | None) -> Int[Tensor, " N"]:
        """Return the number of tokens processed after x [B T ..], per row or document."""
        size = 1 if self.cp_group is None else self.cp_group.size
        return advance(offset, x.shape[0], size * x.shape[1], self.documents, x.device)
