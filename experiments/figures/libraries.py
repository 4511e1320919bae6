"""Altair, vl-convert and Vega: imported only when something is drawn, and named where they are missing."""

import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ...registry import SeqmixError, write_file

try:
    import resource
except ImportError:  # there are none on Windows
    resource = None

ADDRESSES = 66 * 2**30
DATA = 2**30
"""Bytes of addresses that vl-convert's JavaScript engine reserves, and of memory that it writes, with some to spare."""
STATISTICS = Path("/proc/self/statm")


class PlotsMissingError(SeqmixError):
    """What draws figures is not installed, or may not take the memory that it needs."""

    def __init__(self, reason: str = "figures need altair and vl-convert-python: pip install 'seqmix[plots]'") -> None:
        super().__init__(reason)


def converter() -> Any:
    """vl-convert; a PlotsMissingError where it is not installed."""
    try:
        import vl_convert
    except ModuleNotFoundError:
        raise PlotsMissingError from None
    return vl_convert


def engine() -> Any:
    """vl-convert with room for its JavaScript engine; a PlotsMissingError where it is not installed, or a limit of
    memory leaves no room: the engine would abort the process."""
    convert = converter()
    _require_room()
    return convert


@cache  # what the engine has reserved counts no more
def _require_room() -> None:
    if resource is None or not STATISTICS.exists():
        return
    used = [int(pages) * resource.getpagesize() for pages in STATISTICS.read_text().split()]
    for option, kind, taken, needed in (
        ("-v", resource.RLIMIT_AS, used[0], ADDRESSES),
        ("-d", resource.RLIMIT_DATA, used[5], DATA),
    ):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and limit < taken + needed:
            instead = ", or limit memory by ulimit -d" if option == "-v" else ""
            raise PlotsMissingError(
                f"figures need {(taken + needed) / 2**30:.3g} GiB of ulimit {option} (vl-convert reserves them), got "
                f"{limit / 2**30:.3g} GiB: raise the limit{instead}"
            )


def charts_module() -> ModuleType:
    """What makes Altair's charts; a PlotsMissingError where Altair is not installed."""
    try:
        from . import charts
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("altair"):
            raise
        raise PlotsMissingError from None
    return charts


def vega() -> str:
    """The JavaScript of Vega, Vega-Lite and Vega-Embed; bundling takes seconds, so the user's cache keeps it."""
    convert = converter()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    file = Path(root) / "seqmix" / f"vega-{convert.__version__}.js"
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        bundle = engine().javascript_bundle().replace("</script", "<\\/script")
        with suppress(SeqmixError):  # a home that cannot be written
            write_file(bundle, file)
        return bundle
