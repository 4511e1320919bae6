"""The machine: its description, its rates of arithmetic and of copying, and the peak memory of a call."""

import ctypes
import os
import platform
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...models.cpu_linear import USE_ONEDNN, onednn_linear
from .timing import TimedCall

T = TypeVar("T")
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
MEMORY = Path("/proc/meminfo")
PROCESSOR = Path("/proc/cpuinfo")


def synchronizer(device: torch.device) -> Callable[[], Any]:
    """Return a function that waits until the device has finished its work."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def describe(device: torch.device) -> dict[str, Any]:
    """Return the machine and the versions for a report."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or str(device),
        "processor": _field(PROCESSOR, "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _bytes(MEMORY, "MemTotal"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _field(file: Path, key: str) -> str | None:
    """Return a value from a file of /proc, without its unit; None if the system does not have it."""
    try:
        match = re.search(rf"{key}\s*:\s*(.+?)(?: kB)?$", file.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return match[1] if match else None


def _bytes(file: Path, key: str) -> int | None:
    value = _field(file, key)
    return None if value is None else int(value) * 1024


@dataclass(frozen=True)
class Rates:
    """Sizes of a matrix product and a memory copy that measure the machine's rates (FLOP/s, bytes/s), timed in the same
    rounds as a benchmark's calls."""

    size: int
    """Width of the two square matrices that are multiplied."""
    copied: int
    """Bytes of the buffer that is copied; a copy moves each byte twice (read, write)."""

    @classmethod
    def for_device(cls, device: torch.device) -> "Rates":
        """Return sizes at which arithmetic limits the product, and memory beyond all caches limits the copy."""
        return cls(8192, 2**30) if device.type == "cuda" else cls(2048, 2**28)

    def calls(self, device: torch.device, dtype: torch.dtype) -> dict[str, TimedCall]:
        """Return a matrix product and a memory copy of these sizes as timed calls, named "product" and "copy"."""
        a, b, out = (torch.randn(self.size, self.size, device=device).to(dtype) for _ in range(3))
        source = torch.zeros(self.copied, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        onednn = device.type == "cpu" and dtype == torch.float32 and USE_ONEDNN
        product = TimedCall(lambda: onednn_linear(a, b)) if onednn else TimedCall(lambda: torch.mm(a, b, out=out))
        return {"product": product, "copy": TimedCall(lambda: target.copy_(source))}

    @property
    def flops(self) -> int:
        """Floating-point operations of the product."""
        return 2 * self.size**3

    @property
    def moved_bytes(self) -> int:
        """Bytes that the copy reads and writes."""
        return 2 * self.copied


def with_peak_memory(call: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """Run a call; return its result and its peak bytes beyond those held before, None if unknown.

    On a GPU, torch's allocator reports the peak. On Linux it is the process's peak resident memory, which the kernel
    can reset. Freed memory is first returned to the system, since reuse of it would not be counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    before = _reset_peak()
    result = call()
    peak = _bytes(STATUS, "VmHWM")
    return result, None if before is None or peak is None else max(0, peak - before)


def _reset_peak() -> int | None:
    """Reset the peak of resident memory; return the resident bytes, or None if the system cannot do so."""
    with suppress(OSError, AttributeError, TypeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR.write_text("5")
    except OSError:
        return None
    return _bytes(STATUS, "VmRSS")


def available_memory(device: torch.device) -> int:
    """Return the bytes of memory that can still be allocated."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _bytes(MEMORY, "MemAvailable") or sys.maxsize
