"""Batches: sequences cut from a stream, each with the token after every token, and packed where that is wanted.

A batch is a function of (seed, step) alone, so a resumed run sees what the unbroken one would have seen.
"""

from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np
import torch

from ..models import IGNORED, ByteTokenizer
from .corpus import Tokens
from .order import contiguous_windows, epoch_samples, random_starts
from .source import Batch, Packed, share
from .stream import Stream

Order: TypeAlias = Literal["random_windows", "epochs", "contiguous"]


def training_batch(
    tokens: Tokens,
    length: int,
    batch_size: int,
    *,
    seed: int,
    step: int,
    order: Order = "random_windows",
    begin: int = ByteTokenizer.begin,
    rank: int = 0,
    world_size: int = 1,
) -> Batch:
    """The sequences of one step, or one rank's share of them.

    Args:
        tokens: the stream.
        length: tokens of a sequence.
        batch_size: sequences of a step, over all ranks.
        seed: another seed, another order.
        step: the step, from 0.
        order: `random_windows` draws each place; `epochs` cuts the stream into ceil((len - 1) / length) sequences side
            by side and takes each once an epoch; what the last one lacks is padded and not predicted; `contiguous` goes
            on where the step before ended.
        begin: the begin token, that of bytes by default; of another tokenizer it is `tokenizer.begin`.
        rank: which rows are wanted: the ranks' rows, concatenated, are the same batch for any number of ranks.
        world_size: number of ranks.

    Raises:
        SeqmixError: the ranks do not divide the batch.
    """
    rows = share(batch_size, rank, world_size)
    if order == "contiguous":
        starts = contiguous_windows(len(tokens), length, batch_size, seed=seed, step=step).starts
    elif order == "random_windows":
        starts = random_starts(len(tokens) - length, batch_size, seed=seed, step=step)
    else:
        samples = -(-(len(tokens) - 1) // length)
        starts = epoch_samples(samples, batch_size, seed=seed, step=step) * length
    return cut(tokens, starts[rows], length, begin)


def evaluation_batches(
    tokens: Tokens, length: int, batch_size: int, limit: int | None, *, begin: int = ByteTokenizer.begin
) -> Iterator[Batch]:
    """Sequences side by side over the stream, all or `limit` batches spread evenly; the last batch is padded."""
    starts = np.arange(0, len(tokens) - length, length)
    if limit is not None and limit * batch_size < len(starts):
        starts = starts[np.linspace(0, len(starts) - 1, limit * batch_size).round().astype(int)]
    for at in range(0, len(starts), batch_size):
        part = starts[at : at + batch_size]
        batch = cut(tokens, np.resize(part, batch_size), length, begin)
        batch.targets[len(part) :] = IGNORED
        yield batch


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
