"""`seqmix export`: export a trained model to one file, or to a folder for Hugging Face."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..registry import SeqmixError, nearest_hint
from ..training import export_run
from .console import note
from .options import Checkpoint, Ema, Run, Trust, Weights, checkpoint_choice
from .output import visible

FORMATS = ("safetensors", "hf")


@dataclass(frozen=True)
class ExportResult:
    """Result of `seqmix export`."""

    out: str
    """The file or folder that was written."""
    format: str
    """Format of --to."""
    step: int | None
    """Step of the checkpoint; null for Hugging Face."""
    weights: str | None
    """Format of quantised weights; null for floats."""


def export(
    run: Run,
    place: Annotated[
        Path | None, typer.Argument(help="Output, instead of --out.", metavar="[OUT]", show_default=False)
    ] = None,
    to: Annotated[
        str, typer.Option(help="Format: one safetensors file, or a folder for Hugging Face.", metavar="safetensors|hf")
    ] = "safetensors",
    out: Annotated[
        Path | None, typer.Option(help="Output file (.safetensors) or folder; must not exist.", metavar="FILE|DIR")
    ] = None,
    checkpoint: Checkpoint = "newest",
    ema: Ema = False,
    trust: Trust = False,
    remote_code: Annotated[
        bool,
        typer.Option(
            "--remote-code",
            help="With --to hf: also write modeling code, so that trust_remote_code=True replaces `import seqmix.hf`.",
        ),
    ] = False,
    weights: Weights = None,
) -> ExportResult:
    """Export a trained model to one safetensors file with its configuration, or for Hugging Face.

    [bold]seqmix export runs/retnet-tiny --out retnet-tiny.safetensors --checkpoint best[/bold]

    [bold]seqmix generate retnet-tiny.safetensors --prompt "def "[/bold]

    [bold]seqmix export runs/retnet-tiny --weights int8 --out small.safetensors[/bold]

    [bold]seqmix export runs/retnet-tiny --to hf retnet-tiny-hf[/bold]
    """
    if to not in FORMATS:
        raise SeqmixError(f"expected --to {' or '.join(FORMATS)}, got {to!r}{nearest_hint(to, FORMATS)}")
    target = place if out is None else out
    if target is None or (place is not None and out is not None):
        raise SeqmixError("export needs exactly one output: --out FILE, or --to hf DIR")
    choice = checkpoint_choice(checkpoint)
    if remote_code and to != "hf":
        raise SeqmixError("--remote-code needs --to hf: other formats have no modeling code")
    if to == "safetensors":
        step = export_run(run, target, choice=choice, on_note=note, ema=ema, weights=weights, trust=trust)
        typer.echo(visible(f"{target} has the {f'{weights} ' if weights else ''}weights of step {step}"))
        return ExportResult(str(target), to, step, weights)
    if weights is not None:
        raise SeqmixError("--weights needs --to safetensors: models of Hugging Face have weights in floats")
    if find_spec("transformers") is None:
        raise SeqmixError("--to hf needs the package transformers: pip install transformers")
    from ..hf.export import export_hf

    export_hf(run, target, choice=choice, on_note=note, ema=ema, trust=trust, remote_code=remote_code)
    typer.echo(
        visible(
            f"{target} has the model: load it with "
            f"{'' if remote_code else 'import seqmix.hf and '}AutoModelForCausalLM.from_pretrained"
            f"{' and trust_remote_code=True' if remote_code else ''}"
        )
    )
    return ExportResult(str(target), to, None, None)
