"""`seqmix evaluate`: validation loss by sequence length and by context length, or scores of lm-eval's tasks."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..mixers import Paradigm
from ..models import LanguageModel
from ..registry import SeqmixError, nearest, write_file
from ..training import load_run, read_config
from ..training.checkpoint.run_dir import SCORES_FILE
from ..training.length_eval import TIMES, Evaluation, by_context, by_length, common_paradigms, open_text
from .console import note, terminal
from .evaluation_tables import listed, show_evaluation, show_scores, show_side_by_side
from .options import Checkpoint, Device, Ema, JsonFile, Trust, checkpoint_choice, require_device, require_writable

LARGEST_PARALLEL = 8192
"""The longest sequence that the quadratic paradigm evaluates by default, in tokens."""


def evaluate(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run directories, written by `seqmix train`; several are shown side by side.", metavar="RUN..."
        ),
    ],
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
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval instead, separated by commas; needs seqmix[eval].", metavar="NAME,..."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="With --tasks: a folder of further tasks, in YAML.", metavar="DIR")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="With --tasks: examples before each question; the task's own by default.", min=0)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="With --tasks: documents of each task; all by default.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="With --tasks: requests at once.", min=1)] = 16,
    save: Annotated[
        bool,
        typer.Option(
            "--save", help="With --tasks: write the scores to RUN/scores.json, where studies take columns from."
        ),
    ] = False,
    checkpoint: Checkpoint = "newest",
    ema: Ema = False,
    trust: Trust = False,
    device: Device = "cpu",
    json_file: JsonFile = None,
) -> None:
    """Evaluate trained models: the validation loss at lengths beyond that of training, or tasks of lm-eval.

    By length: the loss, and the loss by position, in every paradigm. With --context: the loss of the same tokens after
    contexts of several lengths. With --tasks: lm-eval's scores; a run may then be an exported file.

    [bold]seqmix evaluate runs/retnet-tiny[/bold]

    [bold]seqmix evaluate runs/retnet-tiny --context 64 --context 128 --context 256 --scored 32[/bold]

    [bold]seqmix evaluate runs/retnet-tiny runs/gla --tasks lambada_openai --json scores.json[/bold]
    """
    require_writable(json_file)
    choice = checkpoint_choice(checkpoint)
    load = partial(load_run, device=require_device(device), choice=choice, tell=note, ema=ema, trust=trust)
    if tasks is not None:
        options = {"include_path": include_path, "num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}
        found = {str(run): _task_scores(load(run), tasks, options) for run in runs}
        show_scores(found, terminal())
        for run in runs if save else ():
            _save(found[str(run)]["tasks"], run)
    else:
        if include_path is not None or num_fewshot is not None or limit is not None or save:
            raise SeqmixError("--include-path, --num-fewshot, --limit and --save belong to --tasks NAME,...")
        measure = partial(_measure, load, sorted(set(length or [])), paradigm or [], sorted(set(context or [])))
        evaluations = {str(run): measure(run, scored, tokens) for run in runs}
        if len(runs) == 1:
            show_evaluation(next(iter(evaluations.values())), terminal())
        else:
            show_side_by_side(evaluations, terminal())
        found = {run: asdict(evaluation) for run, evaluation in evaluations.items()}
    if json_file is not None:
        written = found if len(runs) > 1 else next(iter(found.values()))
        write_file(json.dumps(written, indent=2) + "\n", json_file)


def _task_scores(model: LanguageModel, tasks: str, options: dict[str, Any]) -> dict[str, Any]:
    """The scores of lm-eval's tasks, which is imported only here."""
    from ..harness import evaluate_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    return evaluate_tasks(model, names, **options)


def _save(scores: dict[str, Any], run: Path) -> None:
    """Add scores to those in a run's folder."""
    if not run.is_dir():
        raise SeqmixError(f"{run} is not a run directory: --save writes into one")
    file = run / SCORES_FILE
    try:
        before = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise SeqmixError(f"{file} cannot be read, and scores are added to it: {error}") from error
    if not isinstance(before, dict):
        raise SeqmixError(f"{file} is not a mapping of scores, which are added to it")
    write_file(json.dumps(before | scores, indent=2) + "\n", file)


def _measure(
    load: Callable[[Path], LanguageModel],
    given: list[int],
    paradigm: list[str],
    contexts: list[int],
    run: Path,
    scored: int | None,
    tokens: int,
) -> Evaluation:
    """The losses of one run by length and by context."""
    config = read_config(run, tell=note)
    trained = config.data.sequence_length
    lengths = given or ([] if contexts else [times * trained for times in TIMES])
    source = open_text(config, run, [*given, *contexts])
    if not given:  # as far as the validation split allows
        available = len(source.corpus.validation)
        if (left_out := [each for each in lengths if each >= available]) and len(left_out) < len(lengths):
            note(f"{source.name} has {available:,} validation tokens: skipping lengths {listed(left_out)}")
        lengths = [each for each in lengths if each < available]
    model = load(run)
    declared = common_paradigms(model)
    for name in paradigm:
        if name not in declared:
            names = f"{', '.join(declared) or 'none'}{nearest(name, declared)}"
            raise SeqmixError(f"paradigm {name!r} is not declared by all layers; declared by all: {names}")
    chosen = list(map(Paradigm, paradigm or declared))
    if lengths and not chosen:
        raise SeqmixError("the layers of this model have no paradigm in common: evaluation by length is not possible")
    evaluation = Evaluation(trained, scored=(scored or max(min(contexts) // 4, 1)) if contexts else 0)
    with terminal().status("reading the validation split", spinner="dots") as status:

        def measured(length: int) -> Sequence[Paradigm]:
            status.update(f"{length:,} tokens by {listed(chosen)}")
            quick = [each for each in chosen if each != Paradigm.PARALLEL]
            return chosen if paradigm or length <= LARGEST_PARALLEL or not quick else quick

        evaluation.lengths.extend(by_length(model, source, lengths, paradigms=measured, tokens=tokens))
        if contexts:
            status.update(f"contexts of {listed(contexts)} tokens")
            found = by_context(model, source, contexts, scored=evaluation.scored, tokens=tokens)
            evaluation.contexts.extend(found)
    return evaluation
