"""`seqmix evaluate`: validation loss by sequence length and by context length, or scores of lm-eval tasks."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ...mixers import Paradigm
from ...models import LanguageModel
from ...models.quantization import WEIGHTS, quantize_model
from ...registry import DataError, SeqmixError, nearest_hint, require_name, write_file
from ...training import load_run, read_config
from ...training.checkpoint.run_dir import SCORES_FILE
from ...training.length_eval import (
    LENGTH_MULTIPLES,
    Evaluation,
    as_in_training,
    by_context,
    by_length,
    common_paradigms,
    open_text,
)
from ..console import note, terminal
from ..evaluation_tables import join_words, show_evaluation, show_quantized, show_scores, show_side_by_side
from ..options import (
    Checkpoint,
    Device,
    Ema,
    Trust,
    Weights,
    checkpoint_choice,
    require_device,
)

MAX_PARALLEL_LENGTH = 8192
"""Maximum sequence length, in tokens, at which the parallel paradigm is evaluated by default: its cost is quadratic."""


@dataclass(frozen=True)
class EvaluateResult:
    """Result of `seqmix evaluate`."""

    runs: dict[str, dict[str, Any]]
    """By run: the fields of `seqmix.training.length_eval.Evaluation`, and those after quantisation under the name of
    the format; with --tasks, the scores (`tasks`) by task and metric, and the versions."""


def evaluate(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run directories of `seqmix train`; several are shown side by side. With --tasks also exported files.",
            metavar="RUN...",
        ),
    ],
    length: Annotated[
        list[int] | None,
        typer.Option(
            help="Sequence length in tokens; may be repeated. By default 1, 2, 4, 8 and 16 times the training length, "
            "up to the size of the validation split.",
            min=1,
            metavar="TOKENS",
        ),
    ] = None,
    paradigm: Annotated[
        list[str] | None,
        typer.Option(
            help="Paradigm (parallel, recurrent, chunkwise); may be repeated. By default all paradigms that every "
            "layer supports; parallel only up to 8,192 tokens."
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
        typer.Option(
            help="With --context: number of tokens to score; by default a quarter of the shortest context.", min=1
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Approximate number of tokens to evaluate per length; at least one batch.", min=1)
    ] = 16384,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Run these lm-eval tasks, separated by commas; needs the package lm_eval.", metavar="NAME,..."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="With --tasks: a folder with your own tasks, in YAML.", metavar="DIR")
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(help="With --tasks: number of few-shot examples; by default as the task defines.", min=0),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="With --tasks: maximum documents per task; all by default.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="With --tasks: batch size.", min=1)] = 16,
    save: Annotated[
        bool,
        typer.Option(
            "--save", help="With --tasks: write the scores to RUN/scores.json, which studies read columns from."
        ),
    ] = False,
    checkpoint: Checkpoint = "newest",
    ema: Ema = False,
    trust: Trust = False,
    weights: Weights = None,
    device: Device = "cpu",
) -> EvaluateResult:
    """Evaluate trained models: the validation loss at lengths beyond that of training, or tasks of lm-eval.

    By default it shows the loss on the sequences of training's final evaluation and, on a smaller sample, the loss by
    sequence length and by position in every paradigm. With --context, it shows the loss of the same tokens after
    contexts of several lengths. With --tasks, it shows scores of lm-eval. With
    --weights, it measures before and after the weights are quantised.

    [bold]seqmix evaluate runs/retnet-tiny[/bold]

    [bold]seqmix evaluate runs/retnet-tiny --context 64 --context 128 --context 256 --scored 32[/bold]

    [bold]seqmix evaluate runs/retnet-tiny --weights int8 --length 256[/bold]

    [bold]seqmix evaluate runs/retnet-tiny runs/gla --tasks lambada_openai --json scores.json[/bold]
    """
    if weights is not None:
        require_name("weight format", weights, WEIGHTS)
    choice = checkpoint_choice(checkpoint)
    load = partial(load_run, device=require_device(device), choice=choice, on_note=note, ema=ema, trust=trust)
    if tasks is not None:
        options = {"include_path": include_path, "num_fewshot": num_fewshot, "limit": limit, "batch_size": batch_size}
        results = {str(run): _task_scores(load(run), tasks, options) for run in runs}
        if weights is not None:
            results |= {f"{run}, {weights}": _task_scores(load(run, weights=weights), tasks, options) for run in runs}
        show_scores(results, terminal())
        for run in runs if save else ():
            _save_scores(results[str(run)]["tasks"], run)
    else:
        if include_path is not None or num_fewshot is not None or limit is not None or save:
            raise SeqmixError("--include-path, --num-fewshot, --limit and --save need --tasks NAME,...")
        measure = partial(
            _evaluate_run, load, trust, sorted(set(length or [])), paradigm or [], sorted(set(context or []))
        )
        with_quantized = {str(run): measure(run, scored, tokens, weights) for run in runs}
        evaluations = {run: evaluation for run, (evaluation, _) in with_quantized.items()}
        if weights is not None:
            for run, pair in with_quantized.items():
                show_quantized(run, weights, *pair, terminal())
        elif len(runs) == 1:
            show_evaluation(next(iter(evaluations.values())), terminal())
        else:
            show_side_by_side(evaluations, terminal())
        results = {run: asdict(evaluation) for run, evaluation in evaluations.items()}
        if weights is not None:
            for run, (_, quantized) in with_quantized.items():
                results[run][weights] = asdict(quantized)
    return EvaluateResult(results)


def _task_scores(model: LanguageModel, tasks: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run lm-eval's tasks, and return their scores; lm-eval is imported only here."""
    from ...interop.lm_eval import evaluate_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    return evaluate_tasks(model, names, **options)


def _save_scores(scores: dict[str, Any], run: Path) -> None:
    """Add scores to scores.json in a run directory."""
    if not run.is_dir():
        raise SeqmixError(f"--save needs a run directory to write to, got {run}")
    file = run / SCORES_FILE
    try:
        before = json.loads(file.read_text()) if file.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"--save adds scores to {file}, which cannot be read: {error}; move it away") from error
    if not isinstance(before, dict):
        raise SeqmixError(f"--save adds scores to {file}, which is not a JSON object: move it away")
    write_file(json.dumps(before | scores, indent=2) + "\n", file)


def _evaluate_run(
    load: Callable[[Path], LanguageModel],
    trust: bool,
    requested_lengths: list[int],
    paradigm: list[str],
    contexts: list[int],
    run: Path,
    scored: int | None,
    tokens: int,
    weights: str | None,
) -> tuple[Evaluation, Evaluation]:
    """Measure the losses of one run by length and by context, before and after its weights are quantised.

    Without quantisation, both are the same.
    """
    config = read_config(run, on_note=note, trust=trust)
    trained_length = config.data.sequence_length
    lengths = requested_lengths or ([] if contexts else [times * trained_length for times in LENGTH_MULTIPLES])
    source = open_text(config, run, [*requested_lengths, *contexts])
    if not requested_lengths:  # up to the size of the validation split
        available = len(source.corpus.validation)
        if (too_long := [each for each in lengths if each >= available]) and len(too_long) < len(lengths):
            note(f"{source.name} has {available:,} validation tokens: skipping lengths {join_words(too_long)}")
        lengths = [each for each in lengths if each < available]
    model = load(run)
    declared = common_paradigms(model)
    for name in paradigm:
        if name not in declared:
            names = f"{', '.join(declared) or 'none'}{nearest_hint(name, declared)}"
            raise SeqmixError(f"paradigm {name!r} is not supported by all layers; supported by all: {names}")
    chosen = list(map(Paradigm, paradigm or declared))
    if lengths and not chosen:
        raise SeqmixError("the layers of this model have no common paradigm: evaluate it with --context")

    def measure() -> Evaluation:
        is_default = not (requested_lengths or contexts or weights)
        with terminal().status("reading the validation split", spinner="dots") as status:
            final = as_in_training(model, source, config.training) if is_default else None
            n_scored = (scored or max(min(contexts) // 4, 1)) if contexts else 0
            evaluation = Evaluation(trained_length, final, scored=n_scored)

            def choose_paradigms(length: int) -> Sequence[Paradigm]:
                status.update(f"{length:,} tokens by {join_words(chosen)}")
                others = [each for each in chosen if each != Paradigm.PARALLEL]
                return chosen if paradigm or length <= MAX_PARALLEL_LENGTH or not others else others

            evaluation.lengths.extend(by_length(model, source, lengths, paradigms=choose_paradigms, tokens=tokens))
            if contexts:
                status.update(f"contexts of {join_words(contexts)} tokens")
                losses = by_context(model, source, contexts, scored=evaluation.scored, tokens=tokens)
                evaluation.contexts.extend(losses)
        return evaluation

    evaluation = measure()
    if weights is None:
        return evaluation, evaluation
    quantize_model(model, weights, on_note=note)
    return evaluation, measure()
