"""What commands print to: a terminal, or a file or pipe, which is as wide as it must be; tables and notes."""

import os
from collections.abc import Iterable
from typing import Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

WIDE = 200
"""Columns where there is no terminal, and no COLUMNS says how many: a table is not folded."""


def terminal(*, quiet: bool = False) -> Console:
    """A console of standard output; what is printed is no markup, as paths and names are not.

    Args:
        quiet: whether it prints nothing.
    """
    console = Console(markup=False, highlight=False, quiet=quiet)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width, console.soft_wrap = WIDE, True  # a line of a file is a line
    return console


def plain_table(*columns: str, rows: Iterable[Iterable[str]] = (), **options: Any) -> Table:
    """A table with lines above and below its heads alone, as narrow as its cells.

    Args:
        columns: the heads.
        rows: the cells.
        options: those of rich's `add_column`, for all columns.
    """
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, **options)
    for row in rows:
        table.add_row(*row)
    return table


def note(text: str) -> None:
    """Say something beside what is printed, on standard error."""
    typer.secho(f"note: {text}", err=True, fg="yellow")
