"""`seqmix tokenize`: text to a token file, and optionally a BPE tokenizer trained on it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..data.files import TOKENS, Document, read_documents
from ..data.kinds.text import TextConfig
from ..data.stream import tokenized
from ..data.token_file import write_token_file
from ..models import ByteTokenizer, load_tokenizer
from ..models import train_bpe as learn
from ..registry import SeqmixError, load
from ..training.config import PRESETS
from .console import terminal


def tokenize(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Text files, JSON Lines files and folders; and fields of `data` as key=value: text_field=body "
            'dataset="{path: wikitext, name: wikitext-2-raw-v1}"',
            metavar="[SOURCE]... [KEY=VALUE]...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output token file, FILE.tokens.", metavar="FILE")],
    tokenizer: Annotated[
        str, typer.Option(help="bytes, or a tokenizer.json file; with --train-bpe, the tokenizer file to write.")
    ] = "bytes",
    train_bpe: Annotated[
        int | None,
        typer.Option(
            help="Train a byte-level BPE tokenizer of this vocabulary size on the text first; it is written to "
            "FILE.json, or to --tokenizer.",
            metavar="VOCAB",
        ),
    ] = None,
) -> None:
    """Tokenize text once, into a file that training memory-maps; train a BPE tokenizer.

    [bold]seqmix tokenize books/ --out books.tokens --train-bpe 8192[/bold]

    [bold]seqmix train retnet-tiny data.paths="\\[books.tokens]" data.tokenizer=books.json model.vocab_size=8192[/bold]
    """
    config = _config(sources)
    vocabulary = Path(tokenizer) if tokenizer != ByteTokenizer.identity else out.with_suffix(".json")
    if out.suffix != TOKENS:
        raise SeqmixError(f"a token file is named FILE{TOKENS}, and --out is {out}")
    if out.exists():
        raise SeqmixError(f"{out} exists already: remove it, or write elsewhere with --out")
    if train_bpe is not None and vocabulary.exists():
        raise SeqmixError(
            f"{vocabulary} exists already: use it, with --tokenizer {vocabulary} and no --train-bpe, or remove it"
        )
    if not out.parent.is_dir():
        raise SeqmixError(f"the folder {out.parent} does not exist")
    console = terminal()
    counted = TextColumn("{task.description}"), TextColumn("{task.completed:,.0f}")
    columns = SpinnerColumn(), *counted, TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def documents(doing: str) -> Iterator[Document]:
            return iter(progress.track(read_documents(config), description=doing))

        if train_bpe is not None:
            named = ((document.name, document.text) for document in documents("documents for BPE training"))
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
    """Split the sources into paths and overrides of `data`."""
    changes = [source for source in sources if source.partition("=")[0].partition(".")[0] in TextConfig.model_fields]
    paths = [source for source in sources if source not in changes]
    config = load(TextConfig, None, changes, presets=PRESETS)
    if paths:
        config = TextConfig.model_validate(config.model_dump() | {"paths": [*(config.paths or ()), *paths]})
    if config.paths is None and config.dataset is None:
        raise SeqmixError("tokenize needs a SOURCE: files, folders, or dataset={path: ...}")
    return config
