"""`seqmix tokenize`: tokenize text to a token file, and optionally train a BPE tokenizer on it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field, ValidationError
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ...configs import PRESETS
from ...data.corpus_config import DocumentsConfig
from ...data.files import TOKENS, Document, read_documents
from ...data.tasks.text import TextConfig
from ...data.token_file import write_token_file
from ...data.token_store import tokenized
from ...models import ByteTokenizer, load_tokenizer
from ...models import train_bpe as learn
from ...registry import DataError, SeqmixError, explain_fields, load, was_unfinished
from ..console import terminal


@dataclass(frozen=True)
class TokenizeResult:
    """Result of `seqmix tokenize`."""

    out: str
    """The token file."""
    documents: int
    """Number of documents."""
    tokens: int
    """Number of tokens."""
    bytes: int
    """Number of bytes of text."""
    tokenizer: str
    """Value for data.tokenizer."""
    vocab_size: int
    """Value for model.vocab_size."""


def tokenize(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files and folders, as in data.paths, and fields of `data` as key=value: text_field=body "
            'dataset="{path: wikitext, name: wikitext-2-raw-v1}"',
            metavar="[SOURCE]... [KEY=VALUE]...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output token file, FILE.tokens.", metavar="FILE")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Tokenizer: bytes (the default), a tokenizer.json file, or a folder with one. With --train-bpe, the "
            "tokenizer file to write."
        ),
    ] = None,
    train_bpe: Annotated[
        int | None,
        typer.Option(
            help="First train a byte-level BPE tokenizer of this vocabulary size on the text, and write it to "
            "FILE.json or to --tokenizer.",
            metavar="VOCAB",
        ),
    ] = None,
) -> TokenizeResult:
    """Tokenize text once, into a file that training memory-maps; train a BPE tokenizer.

    [bold]seqmix tokenize books/ --out books.tokens --train-bpe 8192[/bold]

    [bold]seqmix train retnet-tiny data.paths="\\[books.tokens]" data.tokenizer=books.json model.vocab_size=8192[/bold]
    """
    config = _parse_sources(sources)
    if tokenizer is not None and config.tokenizer not in (None, tokenizer):
        raise SeqmixError(
            f"two tokenizers are given, --tokenizer {tokenizer} and tokenizer={config.tokenizer}: leave one out"
        )
    name = tokenizer or config.tokenizer or ByteTokenizer.identity
    uses_file = name != ByteTokenizer.identity
    if config.begin_token is not None and (train_bpe is not None or not uses_file):
        raise SeqmixError(
            f"begin_token={config.begin_token} is for a tokenizer in a file; bytes and --train-bpe have a begin token "
            "of their own: leave it out"
        )
    vocabulary = Path(name) if uses_file else out.with_suffix(".json")
    if out.suffix != TOKENS:
        raise SeqmixError(f"expected --out FILE{TOKENS}, got {out}")
    if out.exists():
        raise SeqmixError(f"{out} exists already: remove it, or choose another --out")
    exists_already = SeqmixError(
        f"{vocabulary} exists already: use it with --tokenizer {vocabulary} and without --train-bpe, or remove it"
    )
    vocabulary_exists = train_bpe is not None and vocabulary.exists()
    # a killed command may have left it: it is compared below
    if vocabulary_exists and not was_unfinished(out):
        raise exists_already
    if not out.parent.is_dir():
        raise DataError(f"the folder {out.parent} does not exist: create it, or choose another --out")
    console = terminal()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TextColumn("{task.completed:,.0f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def documents(description: str) -> Iterator[Document]:
            return iter(progress.track(read_documents(config), description=description))

        if train_bpe is not None:
            texts = ((document.name, document.text) for document in documents("documents for BPE training"))
            encoder = learn(texts, train_bpe, vocabulary, write=False)
            if vocabulary_exists and vocabulary.read_bytes() != encoder.vocabulary:
                raise exists_already
        else:
            encoder = load_tokenizer(name, config.begin_token)
        new = vocabulary if train_bpe is not None and not vocabulary_exists else None
        file = write_token_file(out, tokenized(documents("documents tokenized"), encoder), encoder, vocabulary=new)
    tokens = int(file.ends[-1])
    console.print(f"{out}: {len(file.ends):,} documents, {tokens:,} tokens, {file.bytes:,} bytes of text")
    name = name if train_bpe is None else str(vocabulary)
    begin = "" if config.begin_token is None else f' data.begin_token="{config.begin_token}"'
    console.print(
        f'train on it: data.paths="[{out}]" data.tokenizer={name}{begin} model.vocab_size={encoder.vocab_size}',
        soft_wrap=True,
    )
    return TokenizeResult(str(out), len(file.ends), tokens, file.bytes, name, encoder.vocab_size)


class _TokenizeConfig(DocumentsConfig):
    """Fields of `data` that a token file depends on."""

    tokenizer: str | None = Field(default=None, min_length=1)
    begin_token: str | None = None


def _parse_sources(sources: Sequence[str]) -> _TokenizeConfig:
    """Split the command's arguments into paths and fields of `data`."""
    fields = _TokenizeConfig.model_fields
    training_fields = TextConfig.model_fields.keys() - _TokenizeConfig.model_fields.keys()
    paths: list[str] = []
    changes: list[str] = []
    for source in sources:
        name, assigned, _ = source.partition("=")
        field = name.partition(".")[0]
        if field in training_fields:
            raise SeqmixError(
                f"data.{field} is for training, and does not change a token file: leave it out; `seqmix tokenize` "
                f"takes {', '.join(fields)}"
            )
        is_change = field in fields or (assigned and field.isidentifier() and not Path(source).exists())
        (changes if is_change else paths).append(source)
    config = load(_TokenizeConfig, None, changes, presets=PRESETS)
    if paths:
        fields = config.model_dump() | {"paths": [*(config.paths or ()), *paths]}
        try:
            config = _TokenizeConfig.model_validate(fields)
        except ValidationError as error:  # an empty name, or one that is not UTF-8
            raise SeqmixError(explain_fields(error, fields, "command line")) from error
    if config.paths is None and config.dataset is None:
        raise SeqmixError("tokenize needs a SOURCE: files, folders, or dataset={path: ...}")
    return config
