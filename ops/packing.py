"""How tokens are cut: a dense batch is one stretch of all rows, packed documents are a stretch each."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..registry import SeqmixError


class Stretch(NamedTuple):
    """Tokens start to stop - 1 of all rows of the input, and the rows of the state that belong to them."""

    rows: slice
    start: int
    stop: int


def stretches(batch_size: int, length: int, cu_seqlens: Tensor | None) -> list[Stretch]:
    """The stretches of an input, in order; reads the borders, so call it inside an op only.

    Raises:
        SeqmixError: the borders do not start at 0, end at `length`, or decrease.
    """
    if cu_seqlens is None:
        return [Stretch(slice(0, batch_size), 0, length)]
    borders = read_borders(cu_seqlens, length)
    return [Stretch(slice(n, n + 1), borders[n], borders[n + 1]) for n in range(len(borders) - 1)]


def read_borders(cu_seqlens: Tensor, length: int) -> list[int]:
    """The documents' borders as numbers; waits for the device.

    Raises:
        SeqmixError: they do not start at 0, end at `length`, or decrease.
    """
    borders: list[int] = cu_seqlens.tolist()
    if len(borders) < 2 or borders[0] != 0 or borders[-1] != length or sorted(borders) != borders:
        raise SeqmixError(f"cu_seqlens must rise from 0 to the {length} tokens given, and is {borders[:8]}")
    return borders


def require_borders(cu_seqlens: Tensor, length: int) -> None:
    """Refuse wrong borders, here and now where that costs nothing, else in the device's own time.

    Raises:
        SeqmixError: on a CPU, outside compiled code.
        RuntimeError: elsewhere, when the device gets there.
    """
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        read_borders(cu_seqlens, length)
        return
    rises = (cu_seqlens.diff() >= 0).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == length)
    require_async(rises, "cu_seqlens must rise from 0 to the number of tokens given")


def require_async(condition: Tensor, sentence: str) -> None:
    """Refuse what only tensors know, without waiting for the device: it raises when it gets there.

    The sentence names no sizes: a size in a string would make a compiler start anew for every one.
    """
    torch.ops.aten._assert_async.msg(condition, sentence)


def pieces(stretch: Stretch, size: int) -> list[tuple[int, int]]:
    """A stretch cut into pieces of `size` tokens, the last one ragged."""
    return [(at, min(at + size, stretch.stop)) for at in range(stretch.start, stretch.stop, size)]
