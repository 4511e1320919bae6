"""Console output of commands: tables and notes, on a terminal, or without line wrapping in a file or pipe."""

import os
from collections.abc import Iterable
from typing import Any

import typer
from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from .output import visible

WIDE = 200
"""Width without a terminal, in columns, unless COLUMNS is set; wide enough that tables are not folded."""


class _Console(Console):
    """Console that escapes control characters in names and texts, instead of sending them to the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render segments with escaped text; the console's own control segments, which move the cursor, unchanged."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)


def terminal(*, quiet: bool = False) -> Console:
    """Return a console on standard output, without markup, so that paths and names are printed as they are.

    Args:
        quiet: True for a console that prints nothing.
    """
    console = _Console(markup=False, highlight=False, quiet=quiet)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
        console.soft_wrap = True  # lines in a file are never wrapped
    return console


def plain_table(*columns: str, rows: Iterable[Iterable[str]] = (), **options: Any) -> Table:
    """Return a table as narrow as its cells allow, with lines around the header only.

    Args:
        columns: the headers.
        rows: the cells.
        options: options of rich for all columns.
    """
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, **options)
    for row in rows:
        table.add_row(*row)
    return table


def note(text: str) -> None:
    """Print a note on standard error."""
    typer.secho(f"note: {visible(text, err=True)}", err=True, fg="yellow")
