"""`seqmix playground`: write a page that runs trained models in a browser."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ...lab.playground import write_playground
from ..console import note
from ..options import Checkpoint, Ema, Trust, checkpoint_choice
from ..output import visible


@dataclass(frozen=True)
class PlaygroundResult:
    """Result of `seqmix playground`."""

    out: str
    """The folder that was written."""
    page: str
    """The page to open in a browser."""
    bytes: int
    """Size of the folder in bytes."""


def playground(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run directories of `seqmix train`, or files of `seqmix export`.", metavar="RUN..."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist, or be empty.", metavar="DIR")],
    checkpoint: Checkpoint = "newest",
    ema: Ema = False,
    trust: Trust = False,
) -> PlaygroundResult:
    """Write a folder whose index.html runs trained models in a browser, without a network.

    The page opens from disk or from any static server. It generates text, one model at a time or several side by side,
    and shows what every token does to the states, how long heads remember, and where attention looks.

    [bold]seqmix playground runs/retnet-tiny runs/attention-tiny --out playground[/bold]
    """
    write_playground(
        runs,
        out,
        choice=checkpoint_choice(checkpoint),
        on_note=note,
        ema=ema,
        trust=trust,
        on_start=lambda: note(f"exporting {len(runs)} model{'s' * (len(runs) > 1)}, which takes some seconds each"),
    )
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    page = out / "index.html"
    typer.echo(visible(f"{page} is written ({size / 1e6:.1f} MB in the folder): open it in a browser"))
    return PlaygroundResult(str(out), str(page), size)
