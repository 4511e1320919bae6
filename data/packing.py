"""Packing: the sequences of a batch as documents of one row (`cu_seqlens`), so that nothing leaks between documents."""

import numpy as np
import torch

from .sequences import Tokens
from .source import Batch, Packed
from .token_store import Stream


def pack(batch: Batch, most: int, begin: int) -> Packed:
    """The sequences of a batch in one row, in which every sequence and every begin token starts a document.

    Shapes depend on the batch shape alone, for a single compiled graph: the last documents may be empty.

    Args:
        batch: B sequences of T tokens.
        most: maximum number of documents in a sequence (`most_documents`).
        begin: the begin token.

    Raises:
        RuntimeError: a sequence has more documents; on a GPU, asynchronously.
    """
    begins = batch.inputs == begin
    begins[:, 0] = True
    length = begins.numel()
    places = torch.arange(length, device=begins.device)
    # without a count, which would synchronize with the device
    starts = torch.where(begins.flatten(), places, length).sort().values
    size = len(begins) * most
    torch.ops.aten._assert_async.msg((starts[size:] == length).all(), "a sequence has more documents than its stream")
    cu_seqlens = torch.nn.functional.pad(starts[:size], (0, 1), value=length)
    return Packed(batch.inputs.reshape(1, -1), batch.targets.reshape(1, -1), cu_seqlens)


def most_documents(tokens: Tokens, length: int, begin: int) -> int:
    """Maximum number of documents in a sequence, wherever it is cut from the stream."""
    starts = tokens.starts if isinstance(tokens, Stream) else np.flatnonzero(tokens == begin)
    opened = np.searchsorted(starts, starts + length) - np.arange(len(starts))
    return min(length, 1 + int(opened.max(initial=0)))
