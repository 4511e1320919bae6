"""`seqmix average`: the mean of the weights of a run's last checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from ..training.checkpoint.averaging import average_run
from .options import Run
from .output import visible


def average(
    run: Run,
    to: Annotated[Path, typer.Option(help="The new run directory.", metavar="DIR")],
    checkpoints: Annotated[
        int, typer.Option(help="How many of the last checkpoints (training.keep_checkpoints retains them).", min=2)
    ] = 2,
) -> None:
    """Average the weights of a run's last checkpoints, as a run directory that other commands read.

    [bold]seqmix average runs/retnet-tiny --checkpoints 2 --to runs/averaged[/bold]
    """
    steps = average_run(run, to, checkpoints=checkpoints)
    typer.echo(visible(f"{to} has the mean of the weights after steps {', '.join(f'{step:,}' for step in steps)}"))
