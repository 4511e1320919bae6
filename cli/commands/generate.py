"""`seqmix generate`: continue texts with a trained model, and save or load the state after them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ...models import LanguageModel, PromptCache, Sampling, Speculation, cache_text, stream_text
from ...models.decoding import compiled_after
from ...registry import SeqmixError, nearest_hint, require_name
from ...training import load_prompt_cache, load_run, save_prompt_cache
from ...training.checkpoint.saved_run import require_run
from ...training.monitoring.memory import keep_freed_memory
from ..console import note
from ..options import (
    DTYPES,
    Checkpoint,
    Device,
    Ema,
    Trust,
    Weights,
    checkpoint_choice,
    require_device,
    require_writable,
)
from ..output import EXIT_UNREAD, output_error, visible


@dataclass(frozen=True)
class Text:
    """A generated text."""

    prompt: str
    """The prompt; empty for a text that continues a saved state."""
    continuation: str
    """The generated text after it."""


@dataclass(frozen=True)
class GenerateResult:
    """Result of `seqmix generate`."""

    run: str
    """The run directory or file."""
    texts: list[Text]
    """One text per prompt."""
    state: str | None
    """The file of --save-state; null without it."""


def generate(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run directory of `seqmix train`, or a file of `seqmix export` (.safetensors, .onnx).", metavar="RUN"
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue; may be repeated, for a batch of texts.")
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            help="Maximum number of tokens to generate (bytes, by default). 0 with --save-state only reads the prompt.",
            min=0,
        ),
    ] = 400,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 takes the most probable token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample only from the k most probable tokens.")] = None,
    top_p: Annotated[
        float, typer.Option(help="Sample only from the most probable tokens that together reach this probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Random seed; the same seed gives the same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    checkpoint: Checkpoint = "newest",
    ema: Ema = False,
    trust: Trust = False,
    device: Device = "cpu",
    dtype: Annotated[
        str,
        typer.Option(
            help="Dtype of the weights: float32, or bfloat16, which rounds them. Large models then decode about twice "
            "as fast, when compiled or with several prompts."
        ),
    ] = "float32",
    weights: Weights = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the decode step: this takes from seconds to minutes before the second token, and then each "
            "token is faster. By default it is compiled, after the first few hundred tokens, only on a CPU and if so "
            "many tokens are to follow that this saves time: about ten thousand or more, fewer for large models.",
        ),
    ] = None,
    speculate: Annotated[
        str | None,
        typer.Option(
            help="Guess several tokens and verify them in one call; the text stays the same. `ngram` guesses from the "
            "text so far, a run directory by its (smaller) model.",
            metavar="ngram|RUN",
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="File that --save-state wrote: continue after its text. The file has one text for all prompts, or one "
            "for each. Prompts may be left out.",
            metavar="FILE",
        ),
    ] = None,
    save_state: Annotated[
        Path | None,
        typer.Option(help="Write the state after the prompt and the generated text, for --state.", metavar="FILE"),
    ] = None,
) -> GenerateResult:
    """Generate text with a trained model.

    The prompt is processed chunkwise (prefill), then every token takes one recurrent decode step. The tokenizer is the
    run's own copy.

    [bold]seqmix generate runs/retnet-tiny --prompt "def "[/bold]

    [bold]seqmix generate runs/retnet-tiny --prompt "def " --save-state def.state --max-new-tokens 0[/bold]

    [bold]seqmix generate runs/retnet-tiny --state def.state --prompt "main" --prompt "read"[/bold]
    """
    require_run(run, or_file=True)
    prompts = prompt or []
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if run.suffix == ".onnx" and run.is_file():
        unsupported = {
            "--compile" if compiled else "--no-compile": compiled is not None,
            "--speculate": speculate is not None,
            "--device": device != "cpu",
            "--dtype": dtype != "float32",
            "--weights": weights is not None,
            "--checkpoint": checkpoint != "newest",
            "--ema": ema,
            "--state": state is not None,
            "--save-state": save_state is not None,
        }
        return _generate_from_onnx(run, prompts, max_new_tokens, sampling, stop or [], unsupported)
    _check_options(prompts, max_new_tokens, state, save_state, speculate)
    keep_freed_memory()
    torch_device = require_device(device)
    choice = checkpoint_choice(checkpoint)
    require_name("dtype", dtype, DTYPES)
    load = partial(load_run, device=torch_device, choice=choice, on_note=note, ema=ema, trust=trust)
    model = load(run, weights=weights).to(DTYPES[dtype])
    after = None if state is None else load_prompt_cache(state, model)
    if max_new_tokens == 0 and save_state is not None:
        _save_cache(cache_text(model, prompts, after=after), model, save_state)
        return GenerateResult(str(run), [Text(text, "") for text in prompts], str(save_state))
    texts = _printable(prompts)
    if after is not None and len(texts) < 2:  # one prompt, or none, for all cached texts
        texts = (texts or [""]) * len(after)
    speculation = None
    if speculate == "ngram":
        speculation = Speculation()
    elif speculate is not None:
        draft = load_run(Path(speculate), device=torch_device, on_note=note, trust=trust)
        speculation = Speculation(draft.to(DTYPES[dtype]))
    elif compiled is None and not stop and (n_before := compiled_after(model, len(texts), max_new_tokens)):
        note(
            f"after {n_before} tokens, the text pauses while the decode step is compiled, which should save more time "
            "than it takes; disable with --no-compile"
        )
    caches: list[PromptCache] = []
    pieces = stream_text(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop or [],
        compiled=compiled,
        after=after,
        on_end=caches.append if save_state is not None else None,
        speculation=speculation,
    )
    continuations = _print_texts(texts, pieces, runs_to_end=save_state is not None)
    if speculation is not None:
        note(_speculation_summary(speculation))
    if save_state is not None:
        _save_cache(caches[0], model, save_state)
    generated = [Text(text, new) for text, new in zip(texts, continuations, strict=True)]
    return GenerateResult(str(run), generated, None if save_state is None else str(save_state))


def _generate_from_onnx(
    file: Path,
    prompts: list[str],
    max_new_tokens: int,
    sampling: Sampling,
    stop: list[str],
    unsupported: dict[str, bool],
) -> GenerateResult:
    """Generate with an ONNX file.

    Args:
        file: the file.
        prompts: the prompts.
        max_new_tokens: as in `generate`.
        sampling: as in `generate`.
        stop: as in `generate`.
        unsupported: for each option that an ONNX file does not have, True if it was given.
    """
    if names := [name for name, is_given in unsupported.items() if is_given]:
        raise SeqmixError(f"{', '.join(names)} cannot be used with an ONNX file: give generate the run directory")
    _check_options(prompts, max_new_tokens, None, None, None)
    from ...interop.onnx import require_packages

    require_packages("running an ONNX file", "onnxruntime")
    from ...interop.onnx.generate import stream_text as stream_onnx
    from ...interop.onnx.session import OnnxModel

    pieces = stream_onnx(OnnxModel.load(file), prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop)
    texts = _printable(prompts)
    continuations = _print_texts(texts, pieces, runs_to_end=False)
    return GenerateResult(str(file), [Text(text, new) for text, new in zip(texts, continuations, strict=True)], None)


def _printable(prompts: Sequence[str]) -> list[str]:
    """Return the prompts without surrogates, as which bytes of a command line that are not UTF-8 arrive."""
    return [text.encode(errors="surrogateescape").decode(errors="replace") for text in prompts]


def _speculation_summary(speculation: Speculation) -> str:
    if speculation.drafted == 0:
        return f"speculation: nothing to guess from in {speculation.calls:,} calls"
    share = 100 * speculation.accepted / speculation.drafted
    saved = speculation.accepted / speculation.segments
    return (
        f"speculation: {speculation.accepted:,} of {speculation.drafted:,} drafted tokens were right ({share:.0f} %), "
        f"{1 + saved:.1f} tokens per call of the model"
    )


def _print_texts(texts: list[str], pieces: Iterable[list[str]], *, runs_to_end: bool) -> list[str]:
    """Stream a single text, or print several texts when they are complete; return the continuations.

    Args:
        texts: the prompts.
        pieces: yields the new piece of each text.
        runs_to_end: True to generate all tokens even if nobody reads the output, because the state is to be saved.
    """
    continuations = [""] * len(texts)
    if len(texts) == 1:
        has_started = False
        for (piece,) in pieces:
            # the prompt is printed with the first token, so that invalid input shows only an error
            typer.echo(visible(piece if has_started else texts[0] + piece), nl=False)
            has_started = True
            continuations[0] += piece
            if output_error() and not runs_to_end:
                raise typer.Exit(EXIT_UNREAD)
        typer.echo()
        return continuations
    for new in pieces:
        continuations = [text + piece for text, piece in zip(continuations, new, strict=True)]
    for text, continuation in zip(texts, continuations, strict=True):
        typer.echo(f"{visible(text + continuation)}\n{'─' * 40}")
    return continuations


def _save_cache(cache: PromptCache, model: LanguageModel, file: Path) -> None:
    save_prompt_cache(cache, model, file)
    tokens = " and ".join(f"{length:,}" for length in cache.lengths.tolist())
    note(f"{file} has the state after {tokens} tokens")


def _check_options(
    prompts: Sequence[str], max_new_tokens: int, state: Path | None, save_state: Path | None, speculate: str | None
) -> None:
    """Raise SeqmixError for options that do not fit together, before anything is generated."""
    if speculate not in (None, "ngram") and not Path(speculate).exists():
        hint = nearest_hint(speculate, ["ngram"])
        raise SeqmixError(f"--speculate expects ngram or a run directory, got {speculate!r}{hint}")
    if not prompts and state is None:
        raise SeqmixError("generate needs a --prompt TEXT or a --state FILE to continue from")
    if max_new_tokens == 0 and (save_state is None or not prompts):
        raise SeqmixError("--max-new-tokens 0 only reads a prompt: give both --prompt TEXT and --save-state FILE")
    require_writable(save_state)
    if save_state and save_state.exists() and not (state and state.exists() and save_state.samefile(state)):
        raise SeqmixError(
            f"{save_state} exists already: give --save-state another name, or the same name as --state to replace it"
        )
