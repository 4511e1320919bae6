"""The optional packages of figures (Altair, vl-convert): imported when something is drawn, with clear errors."""

import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ...registry import SeqmixError, write_file

try:
    import resource
except ImportError:  # Windows has no resource limits
    resource = None

ADDRESSES = 66 * 2**30
"""Bytes of address space that vl-convert's JavaScript engine reserves, with some to spare."""
DATA = 2**30
"""Bytes of memory that the engine writes, with some to spare."""
STATISTICS = Path("/proc/self/statm")


class PlotsMissingError(SeqmixError):
    """The packages for figures are not installed, or a resource limit leaves them too little memory."""

    def __init__(
        self, reason: str = "figures need altair and vl-convert-python: pip install altair vl-convert-python"
    ) -> None:
        super().__init__(reason)


def converter() -> Any:
    """Import vl-convert.

    Raises:
        PlotsMissingError: it is not installed.
    """
    try:
        import vl_convert
    except ModuleNotFoundError:
        raise PlotsMissingError from None
    return vl_convert


def engine() -> Any:
    """Import vl-convert, and check that its JavaScript engine can reserve memory: if not, it would abort the process.

    Raises:
        PlotsMissingError: vl-convert is not installed, or a resource limit is too low.
    """
    convert = converter()
    _require_memory()
    return convert


@cache  # checked once: later, the memory that the engine has reserved would be counted again
def _require_memory() -> None:
    if resource is None or not STATISTICS.exists():
        return
    used = [int(pages) * resource.getpagesize() for pages in STATISTICS.read_text().split()]
    for option, kind, in_use, needed in (
        ("-v", resource.RLIMIT_AS, used[0], ADDRESSES),
        ("-d", resource.RLIMIT_DATA, used[5], DATA),
    ):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and limit < in_use + needed:
            alternative = ", or limit memory by ulimit -d" if option == "-v" else ""
            raise PlotsMissingError(
                f"figures need ulimit {option} of {(in_use + needed) / 2**30:.3g} GiB (vl-convert reserves it), got "
                f"{limit / 2**30:.3g} GiB: raise the limit{alternative}"
            )


def charts_module() -> ModuleType:
    """Import `charts`, which needs Altair.

    Raises:
        PlotsMissingError: Altair is not installed.
    """
    try:
        from . import charts
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("altair"):
            raise
        raise PlotsMissingError from None
    return charts


def vega() -> str:
    """Return the JavaScript of Vega, Vega-Lite and Vega-Embed; it is cached in the user's folder, as bundling is slow.

    Raises:
        PlotsMissingError: vl-convert is not installed, or a resource limit is too low for bundling.
    """
    convert = converter()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    file = Path(root) / "seqmix" / f"vega-{convert.__version__}.js"
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        bundle = engine().javascript_bundle().replace("</script", "<\\/script")
        with suppress(SeqmixError):  # the cache is optional: the folder may not be writable
            write_file(bundle, file)
        return bundle
