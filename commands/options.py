"""Arguments and options that several commands have, and what their values must be."""

import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..registry import SeqmixError, nearest
from ..training import Choice

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes as dotted.path=value, the value in YAML: training.steps=100 "
        'model.blocks.ret.mixer="{kind: attention, n_heads: 4}"',
        metavar="[KEY=VALUE]...",
    ),
]
Run = Annotated[Path, typer.Argument(help="A folder that `seqmix train` wrote.", metavar="RUN")]
Checkpoint = Annotated[
    str, typer.Option(help="Which one: newest, best (by validation loss), or a step.", metavar="newest|best|STEP")
]
Device = Annotated[str, typer.Option(help="Where: cpu, cuda, ...")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all figures.", metavar="FILE")]


def checkpoint_choice(checkpoint: str) -> Choice:
    """The value of --checkpoint; a SeqmixError where it is none."""
    if checkpoint == "newest" or checkpoint == "best":
        return checkpoint
    if checkpoint.isascii() and checkpoint.isdigit():
        return int(checkpoint)
    raise SeqmixError(
        f"--checkpoint is newest, best or the number of a step, and was given {checkpoint!r}"
        f"{nearest(checkpoint, ('newest', 'best'))}"
    )


def require_device(device: str) -> torch.device:
    """The device of a name; a SeqmixError where it is not there."""
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise SeqmixError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None


def require_writable(*files: Path | None) -> None:
    """Refuse files that could not be written at the end, by a SeqmixError that says why."""
    for file in filter(None, files):
        folder = file.absolute().parent
        if not folder.is_dir():
            raise SeqmixError(f"{file} cannot be written: there is no folder {folder}")
        if file.is_dir():
            raise SeqmixError(f"{file} cannot be written: it is a folder")
        if not os.access(file if file.exists() else folder, os.W_OK):
            raise SeqmixError(f"{file} cannot be written: permission denied")
