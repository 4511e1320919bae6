"""`seqmix tokenize`: text to a token file, and optionally a BPE tokenizer trained on it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field, ValidationError
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..configs import PRESETS
from ..data.corpus_config import DocumentsConfig
from ..data.files import TOKENS, Document, read_documents
from ..data.kinds.text import TextConfig
from ..data.token_file import write_token_file
from ..data.token_store import tokenized
from ..models import ByteTokenizer, load_tokenizer
from ..models import train_bpe as learn
from ..registry import SeqmixError, explain_fields, load, was_unfinished
from .console import terminal


def tokenize(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files and folders as in data.paths; and fields of `data` as key=value: text_field=body "
            'dataset="{path: wikitext, name: wikitext-2-raw-v1}"',
            metavar="[SOURCE]... [KEY=VALUE]...",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output token file, FILE.tokens.", metavar="FILE")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="bytes (the default), or a tokenizer.json file, or a folder that holds one; with --train-bpe, the "
            "tokenizer file to write."
        ),
    ] = None,
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
    if tokenizer is not None and config.tokenizer not in (None, tokenizer):
        raise SeqmixError(f"two tokenizers are given: --tokenizer {tokenizer} and tokenizer={config.tokenizer}")
    given = tokenizer or config.tokenizer or ByteTokenizer.identity
    subwords = given != ByteTokenizer.identity
    if config.begin_token is not None and (train_bpe is not None or not subwords):
        raise SeqmixError(f"begin_token={config.begin_token} is for a tokenizer in a file; this one has its own")
    vocabulary = Path(given) if subwords else out.with_suffix(".json")
    if out.suffix != TOKENS:
        raise SeqmixError(f"a token file is named FILE{TOKENS}, and --out is {out}")
    if out.exists():
        raise SeqmixError(f"{out} exists already: remove it, or write elsewhere with --out")
    taken = SeqmixError(
        f"{vocabulary} exists already: use it, with --tokenizer {vocabulary} and no --train-bpe, or remove it"
    )
    made = train_bpe is not None and vocabulary.exists()
    if made and not was_unfinished(out):  # otherwise it may be of this command, killed: then it is the same
        raise taken
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
            chosen = learn(named, train_bpe, vocabulary, write=False)
            if made and vocabulary.read_bytes() != chosen.vocabulary:
                raise taken
        else:
            chosen = load_tokenizer(given, config.begin_token)
        new = vocabulary if train_bpe is not None and not made else None
        file = write_token_file(out, tokenized(documents("documents tokenized"), chosen), chosen, vocabulary=new)
    tokens = int(file.ends[-1])
    console.print(f"{out}: {len(file.ends):,} documents, {tokens:,} tokens, {file.bytes:,} bytes of text")
    name = given if train_bpe is None else str(vocabulary)
    begin = "" if config.begin_token is None else f' data.begin_token="{config.begin_token}"'
    console.print(
        f'train on it: data.paths="[{out}]" data.tokenizer={name}{begin} model.vocab_size={chosen.vocab_size}',
        soft_wrap=True,
    )


class _Config(DocumentsConfig):
    """The fields of `data` that a token file depends on."""

    tokenizer: str | None = Field(default=None, min_length=1)
    begin_token: str | None = None


def _config(sources: Sequence[str]) -> _Config:
    """Split the sources into paths and overrides of `data`."""
    fields = _Config.model_fields
    of_training = TextConfig.model_fields.keys() - _Config.model_fields.keys()
    paths: list[str] = []
    changes: list[str] = []
    for source in sources:
        name, assigned, _ = source.partition("=")
        field = name.partition(".")[0]
        if field in of_training:
            raise SeqmixError(
                f"data.{field} is for training, and not in a token file: `seqmix tokenize` takes {', '.join(fields)}"
            )
        is_change = field in fields or (assigned and field.isidentifier() and not Path(source).exists())
        (changes if is_change else paths).append(source)
    config = load(_Config, None, changes, presets=PRESETS)
    if paths:
        fields = config.model_dump() | {"paths": [*(config.paths or ()), *paths]}
        try:
            config = _Config.model_validate(fields)
        except ValidationError as error:  # an empty name, or one that is not UTF-8
            raise SeqmixError(explain_fields(error, fields, "command line")) from error
    if config.paths is None and config.dataset is None:
        raise SeqmixError("tokenize needs a SOURCE: files, folders, or dataset={path: ...}")
    return config
