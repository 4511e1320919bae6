"""The `generate` command: what goes on behind what, and how it is shown."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import typer

from ..models import LanguageModel, Reading, Sampling, read_text, stream_text
from ..registry import SeqmixError
from ..training import Choice, load_reading, load_run, save_reading
from ..training.memory import keep_freed_memory


def generate_command(
    run: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    choice: Choice,
    compiled: bool | None,
    state: Path | None,
    save_state: Path | None,
    tell: Callable[[str], object],
) -> None:
    """Continue texts and print them; read a state from a file and write one where that is wanted.

    Raises:
        SeqmixError: the run, an option, or a file cannot be used; nothing is generated before all is there.
    """
    _require_sense(prompts, max_new_tokens, state, save_state)
    keep_freed_memory()
    model = load_run(run, choice=choice, tell=tell)
    behind = None if state is None else load_reading(state, model)
    if max_new_tokens == 0 and save_state is not None:
        _save(read_text(model, prompts, behind=behind), model, save_state)
        return
    kept: list[Reading] = []
    pieces = stream_text(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        compiled=compiled,
        behind=behind,
        keep=kept.append,
    )
    # bytes of a command line that are no text come as surrogates, which no terminal takes
    texts = [text.encode(errors="surrogateescape").decode(errors="replace") for text in prompts]
    # one prompt may be for several texts, and a text may go on without
    _show((texts or [""]) * len(behind) if behind is not None and len(texts) < 2 else texts, pieces)
    if save_state is not None:
        _save(kept[0], model, save_state)


def _show(texts: list[str], pieces: Iterable[list[str]]) -> None:
    """Print one text as it comes, and several when they are done."""
    if len(texts) == 1:
        started = False
        for (piece,) in pieces:
            # the prompt is shown once the first token is there: bad input shows nothing but its error
            typer.echo(piece if started else texts[0] + piece, nl=False)
            started = True
        typer.echo()
        return
    for new in pieces:
        texts = [text + piece for text, piece in zip(texts, new, strict=True)]
    for text in texts:
        typer.echo(f"{text}\n{'─' * 40}")


def _save(reading: Reading, model: LanguageModel, file: Path) -> None:
    save_reading(reading, model, file)
    tokens = " and ".join(f"{length:,}" for length in reading.lengths.tolist())
    typer.secho(f"note: {file} has the state behind {tokens} tokens", err=True, fg="yellow")


def _require_sense(prompts: Sequence[str], max_new_tokens: int, state: Path | None, save_state: Path | None) -> None:
    """Refuse at once what would fail, or come to nothing, at the end."""
    if not prompts and state is None:
        raise SeqmixError("generate needs a --prompt TEXT to continue, or a --state FILE to go on from")
    if max_new_tokens == 0 and (save_state is None or not prompts):
        raise SeqmixError("--max-new-tokens 0 reads a --prompt for --save-state FILE, and needs both")
    if save_state is None:
        return
    folder = save_state.absolute().parent
    if not folder.is_dir():
        raise SeqmixError(f"the folder of --save-state {save_state} does not exist")
    if not os.access(folder, os.W_OK):
        raise SeqmixError(f"the folder of --save-state {save_state} cannot be written to")
    if save_state.exists() and not (state is not None and state.exists() and save_state.samefile(state)):
        raise SeqmixError(
            f"{save_state} exists already: give --save-state another name, or the name of --state, to go on in place"
        )
