"""Altair, vl-convert and Vega: imported only when something is drawn, and named where they are missing."""

import os
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from ...registry import SeqmixError, write_file


class PlotsMissingError(SeqmixError):
    """What draws figures is not installed."""

    def __init__(self) -> None:
        super().__init__("figures need altair and vl-convert-python: pip install 'seqmix[plots]'")


def converter() -> Any:
    """vl-convert; a PlotsMissingError where it is not installed."""
    try:
        import vl_convert
    except ModuleNotFoundError:
        raise PlotsMissingError from None
    return vl_convert


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
        bundle = convert.javascript_bundle().replace("</script", "<\\/script")
        with suppress(SeqmixError):  # a home that cannot be written
            write_file(bundle, file)
        return bundle
