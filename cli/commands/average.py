"""`seqmix average`: average the weights of a run's last checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ...training.checkpoint.averaging import average_run
from ..options import Run, Trust
from ..output import visible


@dataclass(frozen=True)
class AverageResult:
    """Result of `seqmix average`."""

    run: str
    """The new run directory."""
    steps: list[int]
    """Steps of the checkpoints that were averaged."""


def average(
    run: Run,
    to: Annotated[Path, typer.Option(help="New run directory to write.", metavar="DIR")],
    checkpoints: Annotated[
        int, typer.Option(help="Number of last checkpoints to average, at most training.keep_checkpoints.", min=2)
    ] = 2,
    trust: Trust = False,
) -> AverageResult:
    """Average the weights of a run's last checkpoints, and write them as a new run directory.

    Other commands read it like any other run directory, but it cannot be resumed.

    [bold]seqmix average runs/retnet-tiny --checkpoints 2 --to runs/averaged[/bold]
    """
    steps = average_run(run, to, checkpoints=checkpoints, trust=trust)
    typer.echo(visible(f"{to} has the mean of the weights after steps {', '.join(f'{step:,}' for step in steps)}"))
    return AverageResult(str(to), list(steps))
