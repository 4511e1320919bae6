"""`seqmix average`: average the weights of a run's last checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ...registry import SeqmixError
from ...training.checkpoint.averaging import average_run
from ..options import FormerTo, Out, Run, Trust, output_path
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
    place: Out = None,
    out: Annotated[Path | None, typer.Option(help="New run directory to write; must not exist.", metavar="DIR")] = None,
    checkpoints: Annotated[
        int, typer.Option(help="Number of last checkpoints to average, at most training.keep_checkpoints.", min=2)
    ] = 2,
    trust: Trust = False,
    to: FormerTo = None,
) -> AverageResult:
    """Average the weights of a run's last checkpoints, and write them as a new run directory.

    Other commands read it like any other run directory, but it cannot be resumed.

    [bold]seqmix average runs/retnet-tiny runs/averaged --checkpoints 2[/bold]
    """
    target = output_path("average", place, out, former=to)
    if target is None:
        raise SeqmixError("average needs an output: --out DIR")
    steps = average_run(run, target, checkpoints=checkpoints, trust=trust)
    typer.echo(visible(f"{target} has the mean of the weights after steps {', '.join(f'{step:,}' for step in steps)}"))
    return AverageResult(str(target), list(steps))
