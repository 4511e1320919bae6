"""`seqmix export`: a trained model in one file."""

from pathlib import Path
from typing import Annotated

import typer

from ..training import export_run
from .console import note
from .options import Checkpoint, Run, checkpoint_choice


def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="Output file (.safetensors); must not exist.", metavar="FILE")],
    checkpoint: Checkpoint = "newest",
) -> None:
    """Export a trained model to one safetensors file, with its configuration in the metadata.

    [bold]seqmix export runs/retnet-tiny --out retnet-tiny.safetensors --checkpoint best[/bold]

    [bold]seqmix generate retnet-tiny.safetensors --prompt "def "[/bold]
    """
    step = export_run(run, out, choice=checkpoint_choice(checkpoint), tell=note)
    typer.echo(f"{out} has the weights of step {step}")
