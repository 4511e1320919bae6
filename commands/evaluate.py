"""`seqmix evaluate`: validation loss by sequence length and by context length, as tables and JSON."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..mixers import Paradigm
from ..registry import SeqmixError, nearest
from ..training import load_run, read_config
from ..training.length_eval import TIMES, Evaluation, by_context, by_length, common_paradigms, open_text
from .console import note, plain_table, terminal
from .options import Checkpoint, Device, JsonFile, Run, checkpoint_choice, require_device, require_writable

LARGEST_PARALLEL = 8192
"""The longest sequence that the quadratic paradigm evaluates by default, in tokens."""


def evaluate(
    run: Run,
    length: Annotated[
        list[int] | None,
        typer.Option(
            help="Sequence length in tokens; may be repeated. By default 1, 2, 4, 8 and 16 times the training length, "
            "as far as the validation split allows.",
            min=1,
            metavar="TOKENS",
        ),
    ] = None,
    paradigm: Annotated[
        list[str] | None,
        typer.Option(
            help="Paradigm (parallel, recurrent, chunkwise); may be repeated. By default all that every layer "
            "declares, parallel only up to 8,192 tokens."
        ),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            help="Context length in tokens; may be repeated. The same tokens are scored after each context.",
            min=1,
            metavar="TOKENS",
        ),
    ] = None,
    scored: Annotated[
        int | None,
        typer.Option(help="With --context: tokens scored; a quarter of the shortest context by default.", min=1),
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Approximate number of tokens evaluated per length; at least one batch.", min=1)
    ] = 16384,
    checkpoint: Checkpoint = "newest",
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Evaluate a trained model on the validation split, at sequence lengths beyond that of training.

    By length: the loss, and the loss by position, in every paradigm. With --context: the loss of the same tokens after
    contexts of several lengths.

    [bold]seqmix evaluate runs/retnet-tiny[/bold]

    [bold]seqmix evaluate runs/retnet-tiny --context 64 --context 128 --context 256 --scored 32[/bold]
    """
    require_writable(json_file)
    config = read_config(run)
    trained = config.data.sequence_length
    contexts = sorted(set(context or []))
    lengths = sorted(set(length or [])) or ([] if contexts else [times * trained for times in TIMES])
    source = open_text(config, run, [*(length or []), *contexts])
    if not length:  # as far as the validation split allows
        available = len(source.corpus.validation)
        if (left_out := [each for each in lengths if each >= available]) and len(left_out) < len(lengths):
            note(f"{source.name} has {available:,} validation tokens: skipping lengths {_list(left_out)}")
        lengths = [each for each in lengths if each < available]
    model = load_run(run, device=require_device(device), choice=checkpoint_choice(checkpoint), tell=note)
    declared = common_paradigms(model)
    for name in paradigm or []:
        if name not in declared:
            names = f"{', '.join(declared) or 'none'}{nearest(name, declared)}"
            raise SeqmixError(f"paradigm {name!r} is not declared by all layers; declared by all: {names}")
    chosen = list(map(Paradigm, paradigm or declared))
    if lengths and not chosen:
        raise SeqmixError("the layers of this model have no paradigm in common: evaluation by length is not possible")
    evaluation = Evaluation(trained, scored=(scored or max(min(contexts) // 4, 1)) if contexts else 0)
    console = terminal()
    with console.status("reading the validation split", spinner="dots") as status:

        def measured(length: int) -> Sequence[Paradigm]:
            status.update(f"{length:,} tokens by {_list(chosen)}")
            quick = [each for each in chosen if each != Paradigm.PARALLEL]
            return chosen if paradigm or length <= LARGEST_PARALLEL or not quick else quick

        evaluation.lengths.extend(by_length(model, source, lengths, paradigms=measured, tokens=tokens))
        if contexts:
            status.update(f"contexts of {_list(contexts)} tokens")
            found = by_context(model, source, contexts, scored=evaluation.scored, tokens=tokens)
            evaluation.contexts.extend(found)
    _show(evaluation, console)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(evaluation), indent=2) + "\n")


def _show(evaluation: Evaluation, console: Console) -> None:
    if evaluation.lengths:
        console.print("Validation loss in nats/token; every sequence starts without a state.")
        console.print(_lengths(evaluation))
        differing = [found for found in evaluation.lengths if len(found.losses) > 1]
        if differing:
            paradigms = _list(max((found.losses for found in differing), key=len))
            difference = max(found.difference for found in differing)
            console.print(f"Between {paradigms}, the loss of a token differs by at most {difference:.1e} nats.\n")
        console.print("By position in the sequence:")
        console.print(_positions(evaluation))
    if evaluation.contexts:
        scored = f"the last {evaluation.scored:,} tokens of a sequence"
        console.print(f"Validation loss in nats/token of {scored}, by context length:")
        rows = [(f"{found.context:,}", _number(found.loss), f"{found.tokens:,}") for found in evaluation.contexts]
        console.print(plain_table("context", "loss", "tokens scored", rows=rows, justify="right"))


def _lengths(evaluation: Evaluation) -> Table:
    paradigms = list(max((found.losses for found in evaluation.lengths), key=len))
    rows = []
    for found in evaluation.lengths:
        times = f"{round(found.length / evaluation.trained_length, 3):g} x"
        losses = [_number(found.losses.get(paradigm)) for paradigm in paradigms]
        rows.append((f"{found.length:,}", times, *losses, f"{found.tokens:,}"))
    return plain_table("tokens", "of training", *paradigms, "tokens measured", rows=rows, justify="right")


def _positions(evaluation: Evaluation) -> Table:
    """A row per range of positions, a column per length; in the first paradigm."""
    table = plain_table("positions", *(f"{found.length:,}" for found in evaluation.lengths), justify="right")
    columns = [{place.start: place for place in found.positions} for found in evaluation.lengths]
    for start in sorted({start for column in columns for start in column}):
        places = [column.get(start) for column in columns]
        stop = max(place.stop for place in places if place is not None)
        losses = [None if place is None else next(iter(place.losses.values())) for place in places]
        table.add_row(f"{start:,} to {stop - 1:,}", *map(_number, losses))
    return table


def _number(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _list(items: Iterable[object]) -> str:
    *first, last = (f"{item:,}" if isinstance(item, int) else str(item) for item in items)
    return f"{', '.join(first)} and {last}" if first else last
