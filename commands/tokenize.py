"""The `tokenize` command: a vocabulary where one is wanted, and a token file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..data.files import Document, read_documents
from ..data.kinds.text import TextConfig
from ..data.stream import tokenized
from ..data.token_file import TOKENS, write_token_file
from ..models import ByteTokenizer, load_tokenizer
from ..models import train_bpe as learn
from ..registry import SeqmixError, load
from ..training.config import PRESETS
from .console import terminal


def tokenize_command(sources: Sequence[str], out: Path, *, tokenizer: str, train_bpe: int | None) -> None:
    """Write the token file of some sources, and say what it holds.

    Args:
        sources: paths, and changes of `TextConfig` as key=value.
        out: the token file.
        tokenizer: `bytes` or a tokenizer.json; where it is trained, the file that is written (`bytes`: beside `out`).
        train_bpe: tokens of a vocabulary that is to be learned; None for none.

    Raises:
        SeqmixError: a source, the tokenizer or a file cannot be used; nothing is overwritten.
    """
    config = _config(sources)
    vocabulary = Path(tokenizer) if tokenizer != ByteTokenizer.identity else out.with_suffix(".json")
    if out.suffix != TOKENS:
        raise SeqmixError(f"a token file is called FILE{TOKENS}, which tells it from text, and --out is {out}")
    if out.exists():
        raise SeqmixError(f"{out} exists already: remove it, or write elsewhere with --out")
    if train_bpe is not None and vocabulary.exists():
        raise SeqmixError(
            f"{vocabulary} exists already: use it, with --tokenizer {vocabulary} and no --train-bpe, or remove it"
        )
    if not out.parent.is_dir():
        raise SeqmixError(f"the folder {out.parent} does not exist")
    console = terminal()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed:,.0f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def documents(doing: str) -> Iterator[Document]:
            return iter(progress.track(read_documents(config), description=doing))

        if train_bpe is not None:
            named = ((document.name, document.text) for document in documents("documents learned from"))
            chosen = learn(named, train_bpe, vocabulary)
        else:
            chosen = load_tokenizer(tokenizer)
        file = write_token_file(out, tokenized(documents("documents tokenized"), chosen), chosen)
    tokens = int(file.ends[-1])
    console.print(f"{out}: {len(file.ends):,} documents, {tokens:,} tokens, {file.bytes:,} bytes of text")
    name = tokenizer if train_bpe is None else str(vocabulary)
    console.print(
        f'train on it: data.paths="[{out}]" data.tokenizer={name} model.vocab_size={chosen.vocab_size}', soft_wrap=True
    )


def _config(sources: Sequence[str]) -> TextConfig:
    """The paths and changes among the sources."""
    changes = [source for source in sources if source.partition("=")[0].partition(".")[0] in TextConfig.model_fields]
    paths = [source for source in sources if source not in changes]
    config = load(TextConfig, None, changes, presets=PRESETS)
    if paths:
        config = TextConfig.model_validate(config.model_dump() | {"paths": [*(config.paths or ()), *paths]})
    if config.paths is None and config.dataset is None:
        raise SeqmixError("tokenize needs a SOURCE: files, folders, or dataset={path: ...}")
    return config
