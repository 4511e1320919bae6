"""What the machine can do: the rates that figures are shares of, and the memory that a call takes."""

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

from ..models.onednn_linear import USE_ONEDNN, onednn_linear
from .measure import TimedCall

T = TypeVar("T")
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
MEMORY = Path("/proc/meminfo")
PROCESSOR = Path("/proc/cpuinfo")


def synchronizer(device: torch.device) -> Callable[[], Any]:
    """What waits until the device has done what it was given."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions, as a report names them."""
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
    """A value of a file of /proc, without its unit; None where the system has no such thing."""
    try:
        found = re.search(rf"{key}\s*:\s*(.+?)(?: kB)?$", file.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None


def _bytes(file: Path, key: str) -> int | None:
    value = _field(file, key)
    return None if value is None else int(value) * 1024


@dataclass(frozen=True)
class Rates:
    """Two calls that show what the machine can do, timed in the same rounds as all others."""

    size: int
    """The product is of two square matrices of this width."""
    copied: int
    """Bytes of the buffer that is copied; a copy moves each byte twice."""

    @classmethod
    def for_device(cls, device: torch.device) -> "Rates":
        """Large enough to be limited by arithmetic, and by memory beyond every cache."""
        return cls(8192, 2**30) if device.type == "cuda" else cls(2048, 2**28)

    def calls(self, device: torch.device, dtype: torch.dtype) -> dict[str, TimedCall]:
        """The two calls."""
        a, b, out = (torch.randn(self.size, self.size, device=device).to(dtype) for _ in range(3))
        source = torch.zeros(self.copied, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        onednn = device.type == "cpu" and dtype == torch.float32 and USE_ONEDNN
        product = TimedCall(lambda: onednn_linear(a, b)) if onednn else TimedCall(lambda: torch.mm(a, b, out=out))
        return {"product": product, "copy": TimedCall(lambda: target.copy_(source))}

    @property
    def flops(self) -> int:
        """Operations of the product."""
        return 2 * self.size**3

    @property
    def moved(self) -> int:
        """Bytes that the copy reads and writes."""
        return 2 * self.copied


def with_peak_memory(call: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What a call returns, and bytes that it held at most beyond what was held before; None where it is unknown.

    On a GPU by torch's allocator; on Linux by the peak of the process's resident memory, which the kernel can reset.
    Memory that was freed is given back before: what is reused would not be counted.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    held = _reset_peak()
    result = call()
    most = _bytes(STATUS, "VmHWM")
    return result, None if held is None or most is None else max(0, most - held)


def _reset_peak() -> int | None:
    """Start a new peak; the resident bytes, or None where the system has no such thing."""
    with suppress(OSError, AttributeError, TypeError):  # another C library may give memory back by itself
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR.write_text("5")
    except OSError:
        return None
    return _bytes(STATUS, "VmRSS")


def available_memory(device: torch.device) -> int:
    """Bytes that can still be had."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _bytes(MEMORY, "MemAvailable") or sys.maxsize
