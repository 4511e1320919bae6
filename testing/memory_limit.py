"""A limit on main memory: a case that needs too much raises an error, before the system kills the process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..registry import SeqmixError

try:
    import resource
except ImportError:  # Windows has no resource limits
    resource = None

MAX_BYTES = 4 * 2**30
"""Largest number of bytes that a case may allocate; a table of two billion positions, for example, needs more."""

STATISTICS = Path("/proc/self/statm")
"""Linux's file with the memory of this process, in pages."""


class MemoryBoundError(SeqmixError):
    """A case asked for more main memory than `MAX_BYTES`, 4 GiB."""


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
    bounds = [limit for limit in (soft, hard, used + MAX_BYTES) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise MemoryBoundError(
            f"expected a case to need at most {MAX_BYTES / 2**30:g} GiB of memory, got a request for more"
        ) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
