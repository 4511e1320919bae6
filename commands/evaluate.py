"""The `evaluate` command: a run on texts of other lengths, as tables and JSON."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from ..mixers import Paradigm
from ..registry import SeqmixError
from ..training import Choice, load_run, read_config
from ..training.length_eval import (
    TIMES,
    Evaluation,
    by_context,
    by_length,
    common_paradigms,
    open_text,
    require_paradigm_name,
)
from .console import plain_table, terminal

LARGEST_PARALLEL = 8192
"""Tokens of a sequence up to which the quadratic paradigm is measured unasked."""
DIGITS = 4


def evaluate_command(
    run: Path,
    *,
    lengths: Sequence[int],
    paradigms: Sequence[str],
    contexts: Sequence[int],
    scored: int | None,
    tokens: int,
    choice: Choice,
    device: str,
    json_file: Path | None,
    tell: Callable[[str], object],
) -> None:
    """Measure a run at lengths and contexts, and print what was found.

    Raises:
        SeqmixError: the run, its text, a length, a paradigm or the device cannot be used.
    """
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise SeqmixError(f"the folder of --json {json_file} does not exist")
    config = read_config(run)
    trained = config.data.sequence_length
    wanted = sorted(set(lengths)) or ([] if contexts else [times * trained for times in TIMES])
    source = open_text(config, run, [*lengths, *contexts])
    if not lengths:  # as far as the text goes
        held_out = len(source.corpus.validation)
        if (left_out := [length for length in wanted if length >= held_out]) and len(left_out) < len(wanted):
            tell(f"{source.name} holds out {held_out:,} tokens: nothing is measured at {_list(left_out)}")
        wanted = [length for length in wanted if length < held_out]
        source = open_text(config, run, [*wanted, *contexts])
    model = load_run(run, device=_device(device), choice=choice, tell=tell)
    declared = common_paradigms(model)
    chosen = [require_paradigm_name(name, declared) for name in paradigms] or list(declared)
    if wanted and not chosen:
        raise SeqmixError("the layers of this model declare no paradigm in common, so none can be measured by length")
    evaluation = Evaluation(trained, scored=(scored or max(min(contexts) // 4, 1)) if contexts else 0)
    console = terminal()
    with console.status("the texts are read", spinner="dots") as status:

        def measured(length: int) -> Sequence[Paradigm]:
            status.update(f"{length:,} tokens by {_list(chosen)}")
            quick = [paradigm for paradigm in chosen if paradigm != Paradigm.PARALLEL]
            return chosen if paradigms or length <= LARGEST_PARALLEL or not quick else quick

        evaluation.lengths.extend(by_length(model, source, wanted, paradigms=measured, tokens=tokens))
        if contexts:
            status.update(f"contexts of {_list(sorted(set(contexts)))} tokens")
            found = by_context(model, source, sorted(set(contexts)), scored=evaluation.scored, tokens=tokens)
            evaluation.contexts.extend(found)
    _show(evaluation, console)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(evaluation), indent=2) + "\n")


def _show(evaluation: Evaluation, console: Console) -> None:
    if evaluation.lengths:
        console.print("Nats a token of text held out; every sequence starts from nothing.")
        console.print(_lengths(evaluation))
        differing = [found for found in evaluation.lengths if len(found.losses) > 1]
        if differing:
            paradigms = _list(max((found.losses for found in differing), key=len))
            difference = max(found.difference for found in differing)
            console.print(f"By {paradigms}, no token's loss differs by more than {difference:.1e} nats.\n")
        console.print("The same by position in the sequence:")
        console.print(_positions(evaluation))
    if evaluation.contexts:
        console.print(
            f"Nats a token of the last {evaluation.scored:,} tokens of a sequence, behind more and less of it:"
        )
        table = plain_table("context", "loss", "tokens scored", justify="right")
        for found in evaluation.contexts:
            table.add_row(f"{found.context:,}", _number(found.loss), f"{found.tokens:,}")
        console.print(table)


def _lengths(evaluation: Evaluation) -> Table:
    paradigms = list(max((found.losses for found in evaluation.lengths), key=len))
    table = plain_table("tokens", "of training", *paradigms, "tokens measured", justify="right")
    for found in evaluation.lengths:
        table.add_row(
            f"{found.length:,}",
            f"{round(found.length / evaluation.trained_length, 3):g} x",
            *(_number(found.losses.get(paradigm)) for paradigm in paradigms),
            f"{found.tokens:,}",
        )
    return table


def _positions(evaluation: Evaluation) -> Table:
    """A line for each stretch of positions, a column for each length; by the first paradigm."""
    table = plain_table("positions", *(f"{found.length:,}" for found in evaluation.lengths), justify="right")
    columns = [{place.start: place for place in found.positions} for found in evaluation.lengths]
    for start in sorted({start for column in columns for start in column}):
        places = [column.get(start) for column in columns]
        stop = max(place.stop for place in places if place is not None)
        losses = [None if place is None else next(iter(place.losses.values())) for place in places]
        table.add_row(f"{start:,} to {stop - 1:,}", *map(_number, losses))
    return table


def _number(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.{DIGITS}f}"


def _list(items: Iterable[object]) -> str:
    *first, last = (f"{item:,}" if isinstance(item, int) else str(item) for item in items)
    return f"{', '.join(first)} and {last}" if first else last


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SeqmixError(f"--device {name} is not there: {str(error).splitlines()[0]}") from None
    return device
