"""`seqmix generate`: continue texts with a trained model, and save the prompt cache to continue from."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..models import LanguageModel, PromptCache, Sampling, cache_text, stream_text
from ..models.decoding import compiled_after
from ..registry import SeqmixError, require_name
from ..training import load_prompt_cache, load_run, save_prompt_cache
from ..training.monitoring.memory import keep_freed_memory
from .console import note
from .options import DTYPES, Checkpoint, Device, Ema, Trust, checkpoint_choice, require_device, require_writable
from .output import UNREAD, lost, visible


def generate(
    run: Annotated[
        Path,
        typer.Argument(help="A folder that `seqmix train` wrote, or a file that `seqmix export` wrote.", metavar="RUN"),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="The text to continue; several are read as one batch.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens to generate at most: bytes, by default; 0 with --save-state only reads.", min=0)
    ] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Only the k most probable tokens.")] = None,
    top_p: Annotated[float, typer.Option(help="Only the most probable tokens that reach this probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The text is a function of it.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text.")] = None,
    checkpoint: Checkpoint = "newest",
    ema: Ema = False,
    trust: Trust = False,
    device: Device = "cpu",
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the weights: bfloat16 rounds them; large models then decode about twice as fast when compiled, or "
            "several prompts at a time."
        ),
    ] = "float32",
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the decode step: seconds before the second token, less time for each. By default it is "
            "compiled where thousands of tokens follow, after the first have been streamed.",
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Go on after the text of this file, with the prompt or without: one text for all prompts, or one for "
            "each.",
            metavar="FILE",
        ),
    ] = None,
    save_state: Annotated[
        Path | None,
        typer.Option(help="Write there what was read and generated, for --state to go on from.", metavar="FILE"),
    ] = None,
) -> None:
    """Generate text with a trained model.

    Prefill computes the prompt chunkwise, then every token costs one recurrent decode step. The run's
    own copy of its tokenizer encodes and decodes.

    [bold]seqmix generate runs/retnet-tiny --prompt "def "[/bold]

    [bold]seqmix generate runs/retnet-tiny --prompt "def " --save-state def.state --max-new-tokens 0[/bold]

    [bold]seqmix generate runs/retnet-tiny --state def.state --prompt "main" --prompt "read"[/bold]
    """
    prompts = prompt or []
    _require_sense(prompts, max_new_tokens, state, save_state)
    keep_freed_memory()
    where = require_device(device)
    choice = checkpoint_choice(checkpoint)
    require_name("number format", dtype, DTYPES)
    model = load_run(run, device=where, choice=choice, tell=note, ema=ema, trust=trust).to(DTYPES[dtype])
    after = None if state is None else load_prompt_cache(state, model)
    if max_new_tokens == 0 and save_state is not None:
        _save(cache_text(model, prompts, after=after), model, save_state)
        return
    if compiled is None and not stop and (streamed := compiled_after(max_new_tokens)):
        note(
            f"after {streamed} tokens the decode step is compiled, which takes seconds; --no-compile leaves it as it is"
        )
    kept: list[PromptCache] = []
    pieces = stream_text(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        stop=stop or [],
        compiled=compiled,
        after=after,
        on_end=kept.append,
    )
    # bytes of a command line that are not UTF-8 arrive as surrogates, which a terminal refuses
    texts = [text.encode(errors="surrogateescape").decode(errors="replace") for text in prompts]
    # one prompt may be for several texts, and a cached text needs none
    _show(
        (texts or [""]) * len(after) if after is not None and len(texts) < 2 else texts,
        pieces,
        to_the_end=save_state is not None,
    )
    if save_state is not None:
        _save(kept[0], model, save_state)


def _show(texts: list[str], pieces: Iterable[list[str]], *, to_the_end: bool) -> None:
    """Stream a single text; print several when they are complete."""
    if len(texts) == 1:
        started = False
        for (piece,) in pieces:
            # the prompt is printed with the first token: bad input shows nothing but its error
            typer.echo(visible(piece if started else texts[0] + piece), nl=False)
            started = True
            if lost() and not to_the_end:
                raise typer.Exit(UNREAD)
        typer.echo()
        return
    for new in pieces:
        texts = [text + piece for text, piece in zip(texts, new, strict=True)]
    for text in texts:
        typer.echo(f"{visible(text)}\n{'─' * 40}")


def _save(cache: PromptCache, model: LanguageModel, file: Path) -> None:
    save_prompt_cache(cache, model, file)
    tokens = " and ".join(f"{length:,}" for length in cache.lengths.tolist())
    note(f"{file} has the state after {tokens} tokens")


def _require_sense(prompts: Sequence[str], max_new_tokens: int, state: Path | None, save_state: Path | None) -> None:
    """Refuse early what would fail, or be lost, at the end."""
    if not prompts and state is None:
        raise SeqmixError("generate needs a --prompt TEXT to continue, or a --state FILE to go on from")
    if max_new_tokens == 0 and (save_state is None or not prompts):
        raise SeqmixError("--max-new-tokens 0 reads a --prompt for --save-state FILE, and needs both")
    require_writable(save_state)
    if save_state and save_state.exists() and not (state and state.exists() and save_state.samefile(state)):
        raise SeqmixError(
            f"{save_state} exists already: give --save-state another name, or the name of --state, to go on in place"
        )
