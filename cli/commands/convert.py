"""`seqmix convert`: convert weights from and to other libraries."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ...interop.convert import ARCHITECTURES, export_to, import_from
from ...interop.convert.layout import plan
from ...registry import SeqmixError
from ...training.checkpoint.run_dir import CONFIG_FILE
from ..console import note, plain_table, terminal
from ..options import Checkpoint, FormerTo, Out, Trust, checkpoint_choice, output_path
from ..output import visible


@dataclass(frozen=True)
class ConvertResult:
    """Result of `seqmix convert`."""

    architecture: str
    """Architecture of the other library."""
    library: str
    """The other library."""
    to: str | None
    """The folder that was written; null for a dry run."""
    tensors: list[dict[str, str]]
    """For each tensor: its name `here`, its `shape`, where it is `there`, and `how` it is converted."""


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder with config.json and *.safetensors, as written by transformers and fla; with --as, a run "
            "directory or a file of `seqmix export`.",
            metavar="SOURCE",
        ),
    ],
    place: Out = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; must not exist.", metavar="DIR")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--as",
            help=f"Convert a run to this architecture of another library: {', '.join(ARCHITECTURES)}.",
            metavar="NAME",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A tokenizer.json, or `bytes`; by default the tokenizer of SOURCE.", metavar="FILE"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the table of tensors, without writing.")] = False,
    checkpoint: Checkpoint = "newest",
    trust: Trust = False,
    to: FormerTo = None,
) -> ConvertResult:
    """Convert a model of another library to a run directory, or a run to a folder of another library.

    A table shows where every tensor comes from. A tensor or field without a counterpart is an error that names it.

    [bold]seqmix convert downloads/Qwen3-0.6B runs/qwen3[/bold]

    [bold]seqmix convert runs/qwen3 uploads/qwen3 --as qwen3[/bold]
    """
    written = output_path("convert", place, out, former=to)
    if written is None and not dry_run:
        raise SeqmixError("convert needs an output: --out DIR, or --dry-run to only print the table of tensors")
    written = None if dry_run else written
    is_exported = source.is_file() and source.suffix == ".safetensors"
    if target is None and (is_exported or (source / CONFIG_FILE).is_file()):
        raise SeqmixError(
            f"{source} is a model of seqmix: choose the architecture to write with --as: {', '.join(ARCHITECTURES)}"
        )
    if target is None:
        architecture, rules = import_from(source, written, tokenizer)
    else:
        if tokenizer is not None:
            raise SeqmixError(
                "--tokenizer is for models of other libraries, but --as converts a run, which has its own tokenizer: "
                "leave out --tokenizer"
            )
        choice = checkpoint_choice(checkpoint)
        architecture, rules = export_to(source, written, target, choice=choice, on_note=note, trust=trust)
    tensors = plan(rules)
    rows = [(*row[:2], "<-" if target is None else "->", *row[2:]) for row in tensors]
    terminal().print(
        plain_table("here", "shape", "", f"{architecture.name} ({architecture.library})", "how", rows=rows)
    )
    if written is not None:
        typer.echo(visible(f"{written} has {len(rules)} tensors"))
    names: tuple[str, ...] = ("here", "shape", "there", "how")
    table: list[dict[str, str]] = [dict(zip(names, row, strict=True)) for row in tensors]
    return ConvertResult(architecture.name, architecture.library, None if written is None else str(written), table)
