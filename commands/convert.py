"""`seqmix convert`: weights of other libraries' models, and back."""

from pathlib import Path
from typing import Annotated

import typer

from ..convert import ARCHITECTURES, export_to, import_from
from ..convert.layout import plan
from ..registry import SeqmixError
from ..training.checkpoint.run_dir import CONFIG_FILE
from .console import note, plain_table, terminal
from .options import Checkpoint, Trust, checkpoint_choice
from .output import visible


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder with config.json and *.safetensors, as transformers and fla write it; or, with --as, a run "
            "or a file of `seqmix export`.",
            metavar="SOURCE",
        ),
    ],
    to: Annotated[Path | None, typer.Option(help="The folder to write; must not exist.", metavar="DIR")] = None,
    target: Annotated[
        str | None,
        typer.Option("--as", help=f"Write a run as another library's: {', '.join(ARCHITECTURES)}.", metavar="NAME"),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer.json, or bytes; that of SOURCE by default.", metavar="FILE")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan of tensors and write nothing.")] = False,
    checkpoint: Checkpoint = "newest",
    trust: Trust = False,
) -> None:
    """Convert a model of another library to a run directory, or a run to a folder of another library.

    It prints where every tensor comes from. What has no counterpart is refused by its name.

    [bold]seqmix convert downloads/Qwen3-0.6B --to runs/qwen3[/bold]

    [bold]seqmix convert runs/qwen3 --as qwen3 --to uploads/qwen3[/bold]
    """
    if to is None and not dry_run:
        raise SeqmixError("convert needs --to DIR, or --dry-run to print the plan alone")
    out = None if dry_run else to
    is_own = source.is_file() and source.suffix == ".safetensors"
    if target is None and (is_own or (source / CONFIG_FILE).is_file()):
        raise SeqmixError(f"{source} is a model of seqmix: name what to write with --as: {', '.join(ARCHITECTURES)}")
    if target is None:
        architecture, rules = import_from(source, out, tokenizer)
    else:
        if tokenizer is not None:
            raise SeqmixError("--tokenizer is for weights of another library; a run has its own")
        choice = checkpoint_choice(checkpoint)
        architecture, rules = export_to(source, out, target, choice=choice, tell=note, trust=trust)
    rows = [(*row[:2], "<-" if target is None else "->", *row[2:]) for row in plan(rules)]
    terminal().print(
        plain_table("here", "shape", "", f"{architecture.name} ({architecture.library})", "how", rows=rows)
    )
    if out is not None:
        typer.echo(visible(f"{out} has {len(rules)} tensors"))
