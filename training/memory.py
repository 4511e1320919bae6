"""The memory of the process: what it has taken, and what it does with what is freed."""

import ctypes
import sys
from contextlib import suppress

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""The names of mallopt(3)."""


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation, for the life of the process; elsewhere, do nothing.

    By default every large block is given back to the kernel when it is freed, and comes back as empty pages, each of
    which costs a fault: at 8,192 tokens of width 512 that is a seventh of a training step on a CPU. What is held at
    most stays the same.
    """
    _set({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})


def return_freed_memory() -> None:
    """Undo it: what glibc comes to by itself in a process that frees large blocks."""
    _set({M_MMAP_MAX: 2**16, M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26})


def _set(values: dict[int, int]) -> None:
    with suppress(OSError, AttributeError, TypeError):  # another system or C library
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in values.items():
            mallopt(name, value)


def peak_memory(device: torch.device) -> int | None:
    """Bytes taken at most so far: on a GPU by tensors, else by the whole process; None where the system has no word."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
