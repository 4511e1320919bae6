"""Packing: the documents of a batch in one row with `cu_seqlens`, so that no state leaks between documents."""

import numpy as np
import torch

from .sequences import Tokens
from .source import Batch, Packed
from .token_store import Stream


def pack(batch: Batch, most: int, begin: int) -> Packed:
    """Pack the sequences of a batch into one row, in which every sequence and every begin token starts a document.

    Shapes depend on the batch shape only, so that one compiled graph serves all batches; the last documents may be
    empty.

    Args:
        batch: B sequences of T tokens.
        most: maximum number of documents in a sequence (`most_documents`).
        begin: the begin token.

    Raises:
        RuntimeError: there are more than B times `most` documents; on a GPU the error appears at a later call.
    """
    begins = batch.inputs == begin
    begins[:, 0] = True
    length = begins.numel()
    positions = torch.arange(length, device=begins.device)
    # a sort, because a count of the documents would synchronize with the device
    starts = torch.where(begins.flatten(), positions, length).sort().values
    size = len(begins) * most
    has_room = (starts[size:] == length).all()
    torch.ops.aten._assert_async.msg(has_room, "a packed batch has more documents than the maximum for its sequences")
    cu_seqlens = torch.nn.functional.pad(starts[:size], (0, 1), value=length)
    return Packed(batch.inputs.reshape(1, -1), batch.targets.reshape(1, -1), cu_seqlens)


def most_documents(tokens: Tokens, length: int, begin: int) -> int:
    """Return the maximum number of documents in a sequence of `length` tokens, wherever it is cut from the stream."""
    starts = tokens.starts if isinstance(tokens, Stream) else np.flatnonzero(tokens == begin)
    starts_within_length = np.searchsorted(starts, starts + length) - np.arange(len(starts))
    return min(length, 1 + int(starts_within_length.max(initial=0)))
