"""Arguments and options shared by several commands, and checks of their values."""

import os
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from ..registry import DataError, SeqmixError, nearest_hint, parse_duration
from .console import note

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Configuration overrides as dotted.path=value, the value in YAML: training.steps=100 "
        'model.blocks.ret.mixer="{kind: attention, n_heads: 4}"',
        metavar="[KEY=VALUE]...",
    ),
]
Run = Annotated[Path, typer.Argument(help="A run directory, written by `seqmix train`.", metavar="RUN")]
Out = Annotated[
    Path | None, typer.Argument(help="Output, instead of --out; must not exist.", metavar="[OUT]", show_default=False)
]
FormerTo = Annotated[Path | None, typer.Option("--to", hidden=True)]
"""Former name of --out in commands whose output has one format; to be removed in 0.5."""
Checkpoint = Annotated[
    str, typer.Option(help="Checkpoint: newest, best (by validation loss), or a step.", metavar="newest|best|STEP")
]
Ema = Annotated[
    bool, typer.Option("--ema", help="Use the moving average of the weights; needs a run with training.ema.")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Allow an exported file to import the modules that it names by dotted paths, and a run or file to import "
        "the copies of its plug-ins that it carries.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Quantise the weights of linear layers for a CPU: int8 (one scale per output), or int4 (a scale and an "
        "offset per 32 inputs).",
        metavar="int8|int4",
    ),
]
Device = Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:1, ...")]
DeviceOrGpu = Annotated[
    str | None, typer.Option(help="Device: cpu, cuda, cuda:1, ...; by default a GPU if there is one, else the CPU.")
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtypes that --dtype accepts, by name."""
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Write the result as JSON; - is standard output, and all other output then goes to standard error.",
        metavar="FILE",
    ),
]
Jobs = Annotated[int | None, typer.Option(help="Number of runs in parallel; one per core or GPU by default.", min=1)]


def checkpoint_choice(checkpoint: str) -> int | Literal["newest", "best"]:
    """Parse the value of --checkpoint; SeqmixError if it is invalid."""
    if checkpoint == "newest" or checkpoint == "best":
        return checkpoint
    if checkpoint.isascii() and checkpoint.isdigit():
        return int(checkpoint)
    raise SeqmixError(
        f"expected --checkpoint newest, best or the number of a step, got {checkpoint!r}"
        f"{nearest_hint(checkpoint, ('newest', 'best'))}"
    )


def seconds_of(option: str, value: str) -> float:
    """Return the seconds of an option's duration; SeqmixError, which names the option, if it is invalid."""
    try:
        return parse_duration(value)
    except SeqmixError as error:
        raise SeqmixError(f"{option}: {error}") from None


def require_device(device: str) -> torch.device:
    """Return the device with this name; SeqmixError if it is not available."""
    try:
        return torch.empty(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise SeqmixError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None


def require_writable(*files: Path | None) -> None:
    """Raise SeqmixError for a file that cannot be written, before a long computation; None is ignored."""
    for file in filter(None, files):
        folder = file.absolute().parent
        if not folder.is_dir():
            raise DataError(f"{file} cannot be written: there is no folder {folder}; create it")
        if file.is_dir():
            raise DataError(f"{file} cannot be written: it is a folder")
        if not os.access(file if file.exists() else folder, os.W_OK):
            raise DataError(f"{file} cannot be written: permission denied")


def output_path(command: str, *places: Path | None, former: Path | None = None) -> Path | None:
    """Return the output of a command, which is given as OUT or as --out; None if it is not given.

    Args:
        command: name of the command, for messages.
        places: values of OUT and --out.
        former: value of --to, the former name of --out, which is used with a note.

    Raises:
        SeqmixError: the output is given more than once.
    """
    if former is not None:
        note(f"{command} --to is now --out: the old name works until 0.5")
    named = [place for place in (*places, former) if place is not None]
    if len(named) > 1:
        outputs = " and ".join(map(str, named))
        raise SeqmixError(f"{command} expects one output, got {outputs}: give OUT or --out, not both")
    return named[0] if named else None
