"""Charts as a picture, by matplotlib: for what takes no SVG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..registry import SeqmixError
from . import palette
from .chart import Chart, Line

SHAPES = {"circle": "o", "square": "s", "triangle": "^", "diamond": "D", "cross": "P", "down": "v"}
DPI = 200
ENDINGS = (".png", ".pdf")


def require_matplotlib() -> Any:
    """The module whose figures are drawn to files and open no window.

    Raises:
        SeqmixError: it is not installed.
    """
    try:
        from matplotlib import figure
    except ModuleNotFoundError:
        endings = " or ".join(ENDINGS)
        raise SeqmixError(
            f"a {endings} needs matplotlib: pip install 'seqmix[plots]'; .html and .svg need nothing"
        ) from None
    return figure


def write(charts: Sequence[Chart], file: Path, columns: int) -> Path:
    """Draw charts side by side, with one legend.

    Args:
        charts: what is drawn, at least one.
        file: the picture.
        columns: charts in a row, at most.

    Raises:
        SeqmixError: matplotlib is not installed, or the file cannot be written.
    """
    columns = min(columns, len(charts))
    rows = -(-len(charts) // columns)
    drawing = require_matplotlib().Figure(figsize=(4.6 * columns, 3.2 * rows + 0.4), layout="constrained")
    panels = list(drawing.subplots(rows, columns, squeeze=False).flat)
    named: dict[str, Any] = {}
    for panel, chart in zip(panels, charts, strict=False):
        for line in chart.lines:
            handle = _draw(panel, line, joined=chart.joined)
            named[line.name] = handle if not line.faint else named.get(line.name, handle)
        _axes(panel, chart)
    for panel in panels[len(charts) :]:
        panel.set_axis_off()
    drawing.legend(named.values(), named.keys(), loc="outside upper left", ncols=4, frameon=False, fontsize=8)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(file, dpi=DPI)
    except (ValueError, OSError) as error:
        raise SeqmixError(f"{file} cannot be written: {str(error).splitlines()[0]}") from None
    return file


def _draw(panel: Any, line: Line, *, joined: bool) -> Any:
    color = palette.LIGHT_LINES[palette.color(line.style)]
    dashes = palette.dash(line.style)
    style: Any = (0, tuple(map(float, dashes.split()))) if dashes else "-"
    if line.low and joined:
        panel.fill_between(line.x, line.low, line.high, color=color, alpha=0.16, linewidth=0)
    elif line.low:
        panel.vlines(line.x, line.low, line.high, color=color, linewidth=1)
    return panel.plot(
        line.x,
        line.y,
        color=color,
        linestyle=style if joined else "",
        linewidth=0.7 if line.faint else 1.4,
        alpha=0.45 if line.faint else 1,
        marker="" if line.faint else SHAPES[palette.marker(line.style)],
        markevery=max(1, len(line.x) // 8),
        markersize=4,
    )[0]


def _axes(panel: Any, chart: Chart) -> None:
    """The same scales and ticks as in SVG."""
    x, y = chart.scales()
    for name, scale in (("x", x), ("y", y)):
        getattr(panel, f"set_{name}scale")("log" if scale.log else "linear")
        getattr(panel, f"set_{name}lim")(scale.low, scale.high)
        getattr(panel, f"set_{name}ticks")([v for v, _ in scale.ticks], [text for _, text in scale.ticks], fontsize=7)
        getattr(panel, f"set_{name}ticks")([], minor=True)
    panel.set_title(chart.title, fontsize=9, fontweight="bold", loc="left")
    panel.set_xlabel(x.label, fontsize=8)
    panel.set_ylabel(y.label, fontsize=8)
    panel.grid(axis="y", color=palette.LIGHT[palette.RULE])
    panel.spines[["top", "right", "left"]].set_visible(False)
