"""Packed documents: several sequences in one row of tokens, without padding, as flash-attn's `cu_seqlens` has them.

Notation: T tokens of a row, N documents; document n has the tokens cu_seqlens[n] to cu_seqlens[n+1] - 1, possibly none.
A dense batch is one stretch of all rows; packed documents are one stretch each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ...registry import SeqmixError


class Documents(NamedTuple):
    """The documents of one packed row, and what is derived of their boundaries once for all that asks."""

    cu_seqlens: Int[Tensor, "N+1"]
    """The boundaries, from 0 to the tokens of the row (of all processes that share it)."""
    of_token: Int[Tensor, " T"]
    """The document of each token of this process's segment."""
    boundaries: tuple[int, ...] | None
    """The same as cu_seqlens as numbers; None where reading them would wait for a device or stop a compiler."""

    @classmethod
    def of(cls, cu_seqlens: Tensor | None, length: int, start: int = 0, total: int | None = None) -> "Documents | None":
        """Those of given boundaries; None of None.

        Args:
            cu_seqlens: the boundaries.
            length: tokens of the segment.
            start: tokens of the row before it.
            total: tokens of the row; those of the segment when None.

        Raises:
            SeqmixError: the boundaries do not rise from 0 to the tokens of the row; on a CPU and in eager mode.
            RuntimeError: likewise elsewhere, when the device gets there.
        """
        if cu_seqlens is None:
            return None
        boundaries = None
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            boundaries = tuple(read_boundaries(cu_seqlens, length if total is None else total))
        else:
            rises = (cu_seqlens.diff() >= 0).all() & (cu_seqlens[0] == 0)
            rises = rises & (cu_seqlens[-1] == (length if total is None else total))
            require_async(rises, "cu_seqlens must rise from 0 to the number of tokens given")
        return cls(cu_seqlens, document_of_token(cu_seqlens, length, start), boundaries)

    def repeated(self, n: int) -> "Documents":
        """Those of a row in which each token is n tokens."""
        boundaries = None if self.boundaries is None else tuple(n * boundary for boundary in self.boundaries)
        return Documents(n * self.cu_seqlens, self.of_token.repeat_interleave(n), boundaries)

    @property
    def number(self) -> int:
        """Documents, empty ones included."""
        return self.cu_seqlens.shape[0] - 1


class Stretch(NamedTuple):
    """Tokens start to stop - 1 of all rows of the input, and the rows of the state that belong to them."""

    rows: slice
    start: int
    stop: int


def stretches(
    batch_size: int, length: int, cu_seqlens: Tensor | None, boundaries: Sequence[int] | None = None
) -> list[Stretch]:
    """The stretches of an input, in order; may read the boundaries from the device, so call it inside an op only.

    Raises:
        SeqmixError: the boundaries do not start at 0, end at `length`, or decrease.
    """
    if cu_seqlens is None:
        return [Stretch(slice(0, batch_size), 0, length)]
    found = read_boundaries(cu_seqlens, length) if boundaries is None else boundaries
    return [Stretch(slice(n, n + 1), found[n], found[n + 1]) for n in range(len(found) - 1)]


def read_boundaries(cu_seqlens: Tensor, length: int) -> list[int]:
    """The documents' boundaries as numbers; waits for the device.

    Raises:
        SeqmixError: they do not start at 0, end at `length`, or decrease.
    """
    boundaries: list[int] = cu_seqlens.tolist()
    if len(boundaries) < 2 or boundaries[0] != 0 or boundaries[-1] != length or sorted(boundaries) != boundaries:
        raise SeqmixError(f"cu_seqlens must rise from 0 to the {length} tokens given, and is {boundaries[:8]}")
    return boundaries


def require_async(condition: Tensor, sentence: str) -> None:
    """Refuse what only tensors know, without waiting for the device: it raises when it gets there.

    The sentence names no sizes: a size in a string would make a compiler recompile for every one.
    """
    torch.ops.aten._assert_async.msg(condition, sentence)


def document_of_token(cu_seqlens: Int[Tensor, "N+1"], length: int, start: int = 0) -> Int[Tensor, " T"]:
    """The index of the document that each of `length` packed tokens belongs to, from token `start` of the row on."""
    tokens = torch.arange(start, start + length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    # right=True steps over empty documents: the first boundary after the token closes its document
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)


def token_positions(
    length: int, offset: Int[Tensor, " N"] | None, documents: Documents | None, device: torch.device, start: int = 0
) -> Int[Tensor, "B T"]:
    """Positions of a segment's tokens: [1 T] if all rows share them, [B T] if each row starts at its own offset.

    A position is the number of tokens that a sequence (or a packed document) holds before the token. `offset` is the
    tokens read before the segment, by row or document (None: none), `start` those of the row before it, where the
    segment is one process's part of it.
    """
    tokens = torch.arange(start, start + length, device=device)
    if documents is None:
        return tokens[None] if offset is None else offset[:, None] + tokens
    positions = tokens - documents.cu_seqlens[documents.of_token]
    return (positions if offset is None else positions + offset[documents.of_token])[None]


def advance(
    offset: Int[Tensor, " N"] | None, batch_size: int, length: int, documents: Documents | None, device: torch.device
) -> Int[Tensor, " N"]:
    """Tokens read after a segment of `length` tokens (of all processes), by row (by document if packed)."""
    read = length if documents is None else documents.cu_seqlens.diff().to(torch.int64)
    if offset is not None:
        return offset + read
    return torch.full((batch_size,), length, device=device, dtype=torch.int64) if isinstance(read, int) else read
