"""Packed documents: several sequences in one row of tokens, without padding, as in flash-attn's `cu_seqlens`.

Notation: T tokens in a row, N documents. Document n has the tokens cu_seqlens[n] to cu_seqlens[n+1] - 1 and may be
empty. A stretch is a range of tokens that an op processes as one sequence: a dense batch is one stretch with all rows,
a packed row is one stretch per document.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from ...registry import SeqmixError
from .arguments import require_tensor


class Documents(NamedTuple):
    """Documents of one packed row: their boundaries, and values derived from them once for all layers."""

    cu_seqlens: Int[Tensor, "N+1"]
    """Boundaries, from 0 to the number of tokens of the row (over all processes that share it)."""
    of_token: Int[Tensor, " T"]
    """Document index of each token of this process's segment."""
    boundaries: tuple[int, ...] | None
    """Values of cu_seqlens; None where reading them would wait for a device or break a compiled graph."""

    @classmethod
    def of(cls, cu_seqlens: Tensor | None, length: int, start: int = 0, total: int | None = None) -> "Documents | None":
        """Build the documents from their boundaries; returns None if `cu_seqlens` is None.

        Args:
            cu_seqlens: boundaries of the documents of the whole row.
            length: tokens of the segment.
            start: tokens of the row before the segment.
            total: tokens of the row; None means that the segment is the whole row.

        Raises:
            SeqmixError: if the boundaries do not rise from 0 to the number of tokens (on a CPU, in eager mode).
            RuntimeError: the same elsewhere, once the device has computed the condition.
        """
        if cu_seqlens is None:
            return None
        require_tensor("cu_seqlens", cu_seqlens, "an integer tensor of boundaries [N+1]")
        boundaries = None
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            boundaries = tuple(read_boundaries(cu_seqlens, length if total is None else total))
        else:
            rises = (cu_seqlens.diff() >= 0).all() & (cu_seqlens[0] == 0)
            rises = rises & (cu_seqlens[-1] == (length if total is None else total))
            require_async(rises, "cu_seqlens must rise from 0 to the number of tokens")
        return cls(cu_seqlens, document_of_token(cu_seqlens, length, start), boundaries)

    def repeated(self, n: int) -> "Documents":
        """Return the documents of a row in which each token is repeated n times."""
        boundaries = None if self.boundaries is None else tuple(n * boundary for boundary in self.boundaries)
        return Documents(n * self.cu_seqlens, self.of_token.repeat_interleave(n), boundaries)

    @property
    def number(self) -> int:
        """Number of documents, including empty ones."""
        return self.cu_seqlens.shape[0] - 1


class Stretch(NamedTuple):
    """Range of tokens that is processed as one sequence: start to stop - 1, in all rows of the input."""

    rows: slice
    """Rows of the state that belong to these tokens."""
    start: int
    stop: int


def stretches(
    batch_size: int, length: int, cu_seqlens: Tensor | None, boundaries: Sequence[int] | None = None
) -> list[Stretch]:
    """Return the stretches of an input, in order.

    Call this only inside an op: unless `boundaries` is passed, it reads cu_seqlens from the device.

    Raises:
        SeqmixError: if the boundaries do not start at 0, do not end at `length`, or decrease.
    """
    if cu_seqlens is None:
        return [Stretch(slice(0, batch_size), 0, length)]
    if boundaries is None:
        boundaries = read_boundaries(cu_seqlens, length)
    return [Stretch(slice(n, n + 1), boundaries[n], boundaries[n + 1]) for n in range(len(boundaries) - 1)]


def read_boundaries(cu_seqlens: Tensor, length: int) -> list[int]:
    """Return the values of cu_seqlens; waits for the device.

    Raises:
        SeqmixError: if they do not start at 0, do not end at `length`, or decrease.
    """
    boundaries: list[int] = cu_seqlens.tolist()
    if len(boundaries) < 2 or boundaries[0] != 0 or boundaries[-1] != length or sorted(boundaries) != boundaries:
        raise SeqmixError(f"cu_seqlens must rise from 0 to {length}, the number of tokens, got {boundaries[:8]}")
    return boundaries


def require_async(condition: Tensor, sentence: str) -> None:
    """Raise a RuntimeError if a Boolean tensor is False; on a GPU it is raised late, when the device reaches the check.

    The message `sentence` must not contain sizes: compiled code would be recompiled for every size.
    """
    torch.ops.aten._assert_async.msg(condition, sentence)


def document_of_token(cu_seqlens: Int[Tensor, "N+1"], length: int, start: int = 0) -> Int[Tensor, " T"]:
    """Return the document index of each of `length` packed tokens, starting at token `start` of the row."""
    tokens = torch.arange(start, start + length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    # right=True skips empty documents: the first boundary after a token ends its document
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)


def token_positions(
    length: int, offset: Int[Tensor, " N"] | None, documents: Documents | None, device: torch.device, start: int = 0
) -> Int[Tensor, "B T"]:
    """Return the positions of a segment's tokens: [1 T] if all rows share them, [B T] if rows have their own offsets.

    A position is the number of tokens before the token in its sequence (or packed document).

    Args:
        length: tokens of the segment.
        offset: tokens processed before, per row or document; None means 0.
        documents: documents of the packed row, or None.
        device: device of the result.
        start: tokens of the row before this segment, if several processes share the row.
    """
    tokens = torch.arange(start, start + length, device=device)
    if documents is None:
        return tokens[None] if offset is None else offset[:, None] + tokens
    positions = tokens - documents.cu_seqlens[documents.of_token]
    return (positions if offset is None else positions + offset[documents.of_token])[None]


def advance(
    offset: Int[Tensor, " N"] | None, batch_size: int, length: int, documents: Documents | None, device: torch.device
) -> Int[Tensor, " N"]:
    """Return the number of tokens processed after a segment, per row (per document if packed).

    `offset` is the number before the segment (None means 0), `length` the tokens of the segment over all processes.
    """
    read = length if documents is None else documents.cu_seqlens.diff().to(torch.int64)
    if offset is not None:
        return offset + read
    return torch.full((batch_size,), length, device=device, dtype=torch.int64) if isinstance(read, int) else read
