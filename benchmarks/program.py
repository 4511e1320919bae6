"""A module as a program of its own, beside the command: `python -m seqmix.benchmarks.gpu`."""

import sys
from collections.abc import Callable

import typer

from ..registry import SeqmixError


def run_program(main: Callable[..., None]) -> None:
    """Run a function whose parameters are typer's arguments and options; bad input is one sentence, and status 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except SeqmixError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)
