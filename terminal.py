"""The console that commands print to: a terminal, or a file or a pipe, which is as wide as it must be."""

import os

from rich.console import Console

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
