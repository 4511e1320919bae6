"""Console output: a terminal, or a file or pipe of unlimited width; tables and notes."""

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
"""Columns without a terminal, unless COLUMNS is set: tables are not folded."""


class _Console(Console):
    """Shows control characters in names and texts, in place of sending them to the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of what is printed; those of the console itself, which move the cursor, as they are."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)


def terminal(*, quiet: bool = False) -> Console:
    """A console on standard output, without markup: paths and names are printed as they are. A quiet one prints
    nothing."""
    console = _Console(markup=False, highlight=False, quiet=quiet)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
        console.soft_wrap = True  # lines in a file are never wrapped
    return console


def plain_table(*columns: str, rows: Iterable[Iterable[str]] = (), **options: Any) -> Table:
    """A table as narrow as its cells, with lines only around the header; `options` are rich's, of all columns."""
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, **options)
    for row in rows:
        table.add_row(*row)
    return table


def note(text: str) -> None:
    """Print a note on standard error."""
    typer.secho(f"note: {visible(text, err=True)}", err=True, fg="yellow")
