"""`seqmix status`: what runs and studies are doing, or how they ended."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ...training import Status, read_status
from ...training.checkpoint.status import STATUS_FILE
from ..console import plain_table, terminal


@dataclass(frozen=True)
class StatusResult:
    """Result of `seqmix status`."""

    folders: dict[str, Status]
    """Status of each run or study, by folder."""


def status(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Run directories, folders of studies, or a folder of these.", metavar="FOLDER..."),
    ],
) -> StatusResult:
    """Show what runs and studies are doing, or how they ended.

    It reads their status.json. A run whose process ended without a word, such as by `kill -9`, is `killed`.

    [bold]seqmix status runs/retnet-tiny[/bold]

    [bold]seqmix status runs[/bold]
    """
    statuses = {str(run): read_status(run) for folder in folders for run in _runs_of(folder)}
    rows = []
    for folder, each in statuses.items():
        unit = "steps" if each.failed is None else "runs"
        losses = (each.loss, each.validation_loss)
        numbers = ("" if loss is None else f"{loss:.4f}" for loss in losses)
        rows.append(
            (folder, each.state, f"{each.step:,} of {each.steps:,} {unit}", *numbers, each.updated, each.reason)
        )
    headers = ("folder", "state", "done", "loss", "validation", "updated", "reason")
    terminal().print(plain_table(*headers, rows=rows, overflow="fold"))
    return StatusResult(statuses)


def _runs_of(folder: Path) -> list[Path]:
    """Return the runs and studies directly in a folder that is neither, else the folder itself."""
    inside = [] if (folder / STATUS_FILE).exists() else sorted(file.parent for file in folder.glob(f"*/{STATUS_FILE}"))
    return inside or [folder]
