"""Batches: sequences cut from a stream, each with the token after every token, and packed where that is wanted."""

import numpy as np
import torch

from ..models import IGNORED
from .corpus import Tokens
from .source import Batch, Packed
from .stream import Stream


def pack(batch: Batch, most: int, begin: int) -> Packed:
    """The sequences of a batch in one row, in which every sequence and every begin token starts a document.

    Shapes depend on the batch's alone, so that one graph serves all: after the last document come empty ones.

    Args:
        batch: B sequences of T tokens.
        most: documents of a sequence at most (`most_documents`).
        begin: the begin token.

    Raises:
        RuntimeError: a sequence has more documents; on a GPU, in its own time.
    """
    begins = batch.inputs == begin
    begins[:, 0] = True
    length = begins.numel()
    places = torch.arange(length, device=begins.device)
    # no count is asked for, which would wait for the device
    starts = torch.where(begins.flatten(), places, length).sort().values
    kept = len(begins) * most
    torch.ops.aten._assert_async.msg((starts[kept:] == length).all(), "a sequence has more documents than its stream")
    cu_seqlens = torch.nn.functional.pad(starts[:kept], (0, 1), value=length)
    return Packed(batch.inputs.reshape(1, -1), batch.targets.reshape(1, -1), cu_seqlens)


def most_documents(tokens: Tokens, length: int, begin: int) -> int:
    """Documents in a sequence at most, wherever it is cut from the stream: the one it starts in, and those it opens."""
    starts = tokens.starts if isinstance(tokens, Stream) else np.flatnonzero(tokens == begin)
    opened = np.searchsorted(starts, starts + length) - np.arange(len(starts))
    return min(length, 1 + int(opened.max(initial=0)))


def cut(tokens: Tokens, starts: np.ndarray, length: int, begin: int) -> Batch:
    """The sequences of `length` tokens from these places on; what the stream lacks is padded and not predicted."""
    windows = np.zeros((len(starts), length + 1), dtype=np.int64)
    there = np.zeros(windows.shape, dtype=bool)
    for row, start in enumerate(starts.tolist()):
        found = tokens[start : start + length + 1]
        windows[row, : len(found)], there[row, : len(found)] = found, True
    wanted = there & (windows != begin)
    targets = np.where(wanted, windows, IGNORED)
    return Batch(torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(targets[:, 1:].copy()))
