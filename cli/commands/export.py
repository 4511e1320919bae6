"""`seqmix export`: export a trained model to one file, to a folder for Hugging Face, or to ONNX."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ...registry import SeqmixError, nearest_hint
from ...training import export_run
from ..console import note
from ..options import Checkpoint, Ema, Out, Run, Trust, Weights, checkpoint_choice, output_path
from ..output import visible

FORMATS = ("safetensors", "hf", "onnx")


@dataclass(frozen=True)
class ExportResult:
    """Result of `seqmix export`."""

    out: str
    """The file or folder that was written."""
    format: str
    """Format of --to."""
    step: int | None
    """Step of the checkpoint; null for Hugging Face and ONNX."""
    weights: str | None
    """Format of quantised weights; null for floats."""
    loss: float | None = None
    """Validation loss in nats per token before the weights were quantised; null unless it was measured, for ONNX."""
    quantised_loss: float | None = None
    """Validation loss in nats per token after that."""


def export(
    run: Run,
    place: Out = None,
    to: Annotated[
        str,
        typer.Option(
            help="Format: one safetensors file, a folder for Hugging Face, or one ONNX file.",
            metavar="safetensors|hf|onnx",
        ),
    ] = "safetensors",
    out: Annotated[
        Path | None,
        typer.Option(help="Output file (.safetensors, .onnx) or folder; must not exist.", metavar="FILE|DIR"),
    ] = None,
    checkpoint: Checkpoint = "newest",
    ema: Ema = False,
    trust: Trust = False,
    remote_code: Annotated[
        bool,
        typer.Option(
            "--remote-code",
            help="With --to hf: also write modeling code, which trust_remote_code=True loads without the import.",
        ),
    ] = False,
    weights: Weights = None,
    opset: Annotated[
        str | None,
        typer.Option(
            help="With --to onnx: source of the operator LinearAttention, ONNX Runtime's own operators (contrib, the "
            "default) or version 27 of the standard.",
            metavar="contrib|27",
        ),
    ] = None,
) -> ExportResult:
    """Export a trained model to one safetensors file with its configuration, for Hugging Face, or to ONNX.

    [bold]seqmix export runs/retnet-tiny --out retnet-tiny.safetensors --checkpoint best[/bold]

    [bold]seqmix generate retnet-tiny.safetensors --prompt "def "[/bold]

    [bold]seqmix export runs/retnet-tiny --weights int8 --out small.safetensors[/bold]

    [bold]seqmix export runs/retnet-tiny --to hf retnet-tiny-hf[/bold]

    [bold]seqmix export runs/retnet-tiny --to onnx retnet-tiny.onnx[/bold]
    """
    if to not in FORMATS:
        raise SeqmixError(f"expected --to {' or '.join(FORMATS)}, got {to!r}{nearest_hint(to, FORMATS)}")
    target = output_path("export", place, out)
    if target is None:
        what = {"safetensors": "FILE.safetensors", "hf": "DIR", "onnx": "FILE.onnx"}[to]
        raise SeqmixError(f"export --to {to} needs an output: --out {what}")
    if to == "safetensors" and target.suffix == ".onnx":
        raise SeqmixError(f"{target} is the name of an ONNX file: add --to onnx")
    if opset is not None and to != "onnx":
        raise SeqmixError("--opset needs --to onnx")
    choice = checkpoint_choice(checkpoint)
    if remote_code and to != "hf":
        raise SeqmixError("--remote-code needs --to hf: other formats have no modeling code")
    if to == "onnx":
        from ...interop.onnx import export_onnx

        result = export_onnx(
            run, target, opset=opset or "contrib", weights=weights, choice=choice, ema=ema, trust=trust, on_note=note
        )
        before, after = result.losses or (None, None)
        if before is not None and after is not None:
            typer.echo(
                f"loss of {result.tokens:,} tokens of the validation split: {before:.5f} nats/token as trained, "
                f"{after:.5f} with {weights} weights ({after / before - 1:+.3%})"
            )
        typer.echo(visible(f"{target} has the model: run it with `seqmix generate {target} --prompt TEXT`"))
        return ExportResult(str(target), to, None, weights, before, after)
    if to == "safetensors":
        step = export_run(run, target, choice=choice, on_note=note, ema=ema, weights=weights, trust=trust)
        typer.echo(visible(f"{target} has the {f'{weights} ' if weights else ''}weights of step {step}"))
        return ExportResult(str(target), to, step, weights)
    if weights is not None:
        raise SeqmixError("--weights needs --to safetensors or onnx: models of Hugging Face have weights in floats")
    if find_spec("transformers") is None:
        raise SeqmixError("--to hf needs the package transformers: pip install transformers")
    from ...interop.hf.export import export_hf

    export_hf(run, target, choice=choice, on_note=note, ema=ema, trust=trust, remote_code=remote_code)
    typer.echo(
        visible(
            f"{target} has the model: load it with "
            f"{'' if remote_code else 'import seqmix.interop.hf and '}AutoModelForCausalLM.from_pretrained"
            f"{' and trust_remote_code=True' if remote_code else ''}"
        )
    )
    return ExportResult(str(target), to, None, None)
