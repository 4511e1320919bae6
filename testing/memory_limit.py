"""A limit on main memory: a case that asks for too much gets an error, where the system would kill the process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..registry import SeqmixError

try:
    import resource
except ImportError:  # Windows has no resource limits
    resource = None

MOST = 4 * 2**30
"""Bytes that a case may allocate. A table of two billion positions, for instance, is larger."""

STATISTICS = Path("/proc/self/statm")
"""Linux's file with the memory of this process, in pages."""


class MemoryBoundError(SeqmixError):
    """A case asked for more main memory than `MOST`, 4 GiB."""


@contextmanager
def limited_memory() -> Iterator[None]:
    """Limit the main memory that a `with` block may allocate to 4 GiB on Linux; elsewhere there is no limit.

    Raises:
        MemoryBoundError: an allocation was refused.
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
        raise MemoryBoundError(
            f"expected a case to need at most {MOST / 2**30:g} GiB of memory, got a request for more"
        ) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
