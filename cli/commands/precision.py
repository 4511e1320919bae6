"""`seqmix precision`: the loss of a trained model whose state is stored in fewer bits."""

from collections.abc import Collection
from itertools import product
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ...data import Batch
from ...lab.figures.writer import content_of, require_drawable
from ...lab.precision.measure import Precision, state_precision
from ...lab.precision.report import COLUMNS, FIGURES, conclusion, figures_of, notes, render, rows_of
from ...lab.precision.state_format import FORMATS, ROUNDINGS, Scales, StateFormat
from ...models import IGNORED
from ...registry import SeqmixError, choices_hint, require_name, write_files
from ...training import RunConfig, load_run, read_config
from ...training.length_eval import open_text
from ..console import note, plain_table, terminal
from ..options import Checkpoint, Device, Ema, Trust, checkpoint_choice, require_device, require_writable
from ..output import visible
from .plot import select_figures

LENGTH_MULTIPLES = (1, 4)
"""Default lengths, as multiples of the training length."""


def precision(
    run: Annotated[Path, typer.Argument(help="A run directory, written by `seqmix train`.", metavar="RUN")],
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Numbers of tokens after which results are reported, separated by commas: 256,1024,4096. By default 1 "
            "and 4 times the training length; a task has one length.",
            metavar="TOKENS,...",
        ),
    ] = None,
    formats: Annotated[
        str, typer.Option(help=f"Number formats, separated by commas: {', '.join(FORMATS)}.", metavar="NAME,...")
    ] = ",".join(name for name in FORMATS if name != "float32"),
    rounding: Annotated[
        str,
        typer.Option(
            help="Ways of rounding, separated by commas: nearest; stochastic, up or down at random; compensated, which "
            "carries the rounding error along and so doubles the memory.",
            metavar="NAME,...",
        ),
    ] = "nearest",
    every: Annotated[int, typer.Option(help="Number of tokens between roundings.", min=1)] = 1,
    scales: Annotated[
        str, typer.Option(help="Numbers of int8 and int4 that share a scale: those of a channel, or of a head.")
    ] = "channel",
    keep_exact: Annotated[
        list[str] | None,
        typer.Option(help="Do not round this tensor of the state, such as angle; may be repeated.", metavar="NAME"),
    ] = None,
    sequences: Annotated[int, typer.Option(help="Number of sequences to read.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Random seed of stochastic rounding.")] = 0,
    out: Annotated[
        Path, typer.Option(help="Output file: a page (.html) or an image (.pdf, .svg, .png).", metavar="FILE")
    ] = Path("precision.html"),
    figure: Annotated[
        list[str] | None,
        typer.Option(help="Plot only this figure, such as lost; may be repeated. All by default.", metavar="NAME"),
    ] = None,
    checkpoint: Checkpoint = "newest",
    ema: Ema = False,
    trust: Trust = False,
    device: Device = "cpu",
) -> Precision:
    """Measure the loss of a trained model whose state is stored in fewer bits, and the error of the state.

    The model reads held-out sequences token by token. After each token its state is rounded to bfloat16, float16, int8
    or int4, and computed with in float32. A prediction from the decay of one rounding's error stands beside the errors.

    [bold]seqmix precision runs/retnet-tiny --lengths 256,1024,4096[/bold]

    [bold]seqmix precision runs/retnet-tiny --formats int8,int4 --rounding nearest,stochastic,compensated[/bold]
    """
    for name in figure or []:
        require_name("figure", name, FIGURES)
    shared = _names("--scales", scales, get_args(Scales))
    if len(shared) > 1:
        raise SeqmixError(f"expected --scales channel or head, got {scales!r}")
    chosen = [
        StateFormat(name, way, shared[0])
        for name, way in product(_names("--formats", formats, FORMATS), _names("--rounding", rounding, ROUNDINGS))
    ]
    require_writable(out)
    require_drawable("--out", out)
    config = read_config(run, on_note=note, trust=trust)
    batch, chosen_lengths = _sequences(config, run, lengths, sequences)
    choice = checkpoint_choice(checkpoint)
    model = load_run(run, device=require_device(device), choice=choice, on_note=note, ema=ema, trust=trust)
    with terminal().status("", spinner="dots") as status:
        total = chosen_lengths[-1]
        result = state_precision(
            model,
            batch,
            chosen,
            chosen_lengths,
            every=every,
            keep_exact=keep_exact or [],
            seed=seed,
            on_token=lambda n: status.update(f"{n:,} of {total:,} tokens") if n % 16 == 0 else None,
        )
    console = terminal()
    console.print(conclusion(result))
    console.print(plain_table(*COLUMNS, rows=rows_of(result), justify="right"))
    console.print(notes(result))
    figures = select_figures(figures_of(result), figure or [])
    text = conclusion(result)
    if figure or out.suffix.lower() != ".html":
        contents: dict[Path, str | bytes] = {out: content_of(figures, out.suffix, title=str(run), text=text)}
    else:
        contents = {out: render(result, str(run), figures)}
    write_files(contents)
    typer.echo(visible(f"{out} is written"))
    return result


def _names(option: str, text: str, allowed: Collection[str]) -> list[Any]:
    """Return the different names of an option; SeqmixError if there are none, or one is not allowed."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise SeqmixError(f"expected {option} with at least one of {', '.join(allowed)}, got {text!r}")
    for name in names:
        if name not in allowed:
            raise SeqmixError(f"{option} got {name!r}{choices_hint(name, allowed)}")
    return names


def _sequences(config: RunConfig, run: Path, lengths: str | None, sequences: int) -> tuple[Batch, list[int]]:
    """Return sequences of the validation split, and the lengths at which to report results."""
    trained = config.data.sequence_length
    if config.data.kind != "text":
        if lengths is not None:
            raise SeqmixError(f"--lengths needs a run trained on text, got {config.data.kind}: its length is {trained}")
        chosen = [trained]
        source = config.data.open(config.model.vocab_size, run)
        examples = next(iter(source.evaluation_batches(sequences, 1)))
    else:
        requested = _lengths(lengths)
        text = open_text(config, run, requested or [trained])
        available = len(text.corpus.validation)
        chosen = requested or [n for times in LENGTH_MULTIPLES if (n := times * trained) < available]
        examples = next(iter(text.evaluation_batches(sequences, 1, chosen[-1])))
    batch = examples.batch
    scored = (batch.targets != IGNORED).any(1)  # a batch is padded if the split has fewer sequences
    if (n := int(scored.sum())) < sequences:
        note(f"the validation split has {n} sequences of {chosen[-1]:,} tokens, not {sequences}")
    return Batch(batch.inputs[scored], batch.targets[scored]), chosen


def _lengths(lengths: str | None) -> list[int]:
    """Return the numbers of the option in ascending order; none by default."""
    if lengths is None:
        return []
    parts = [part.strip() for part in lengths.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 and int(part) > 1 for part in parts):
        raise SeqmixError(f"expected --lengths as numbers from 2 on, such as 256,1024, got {lengths!r}")
    return sorted(set(map(int, parts)))
