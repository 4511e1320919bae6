"""What asks for too much main memory gets an error: the system would end the process without a word."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..registry import SeqmixError

try:
    import resource
except ImportError:  # there are none on Windows
    resource = None

MOST = 4 * 2**30
"""Bytes that a case may take: a table of two billion positions has more."""

STATISTICS = Path("/proc/self/statm")


class MemoryBoundError(SeqmixError):
    """More main memory was asked for than a case may take."""


@contextmanager
def limited_memory() -> Iterator[None]:
    """Inside, allocations of more than 4 GiB on the CPU are refused (on Linux; elsewhere nothing changes).

    Raises:
        MemoryBoundError: something was refused.
    """
    if resource is None or not STATISTICS.exists():
        yield
        return
    before = soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(STATISTICS.read_text().split()[5]) * resource.getpagesize()
    bounds = [limit for limit in (soft, hard, used + MOST) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise MemoryBoundError(f"asks for more than {MOST / 2**30:g} GiB of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
