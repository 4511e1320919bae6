"""Configuration of a text: its documents, tokenizer, and training and validation split."""

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..models import TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from ..registry import Config, SeqmixError
from .source import DataConfig

UTF8 = "utf-8"
BYTES = "bytes"
"""Encodings with a meaning of their own."""
MOST_FOLDERS = 2
"""Times that a glob may have `**`."""


class DatasetConfig(Config):
    """A dataset of Hugging Face `datasets`: each row is a document."""

    path: str = Field(min_length=1)
    """A folder of `save_to_disk`, or what `load_dataset` takes: a name on the hub, a folder, or a format (parquet)."""
    name: str | None = None
    """The dataset's own configuration, if it has several."""
    data_files: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(default=None, min_length=1)
    """Files of the dataset, or patterns of them; null for all."""
    split: str = Field(default="train", min_length=1)
    """The dataset's split that is read; `data.split` divides it into training and validation split."""
    streaming: bool = False
    """Whether training reads rows as it needs them, without a copy in memory or on disk, again and again from start to
    end; a checkpoint holds the place. Needs `data.validation`."""
    shuffle_buffer: int = Field(default=1000, gt=0)
    """Rows that are shuffled together when training streams them; 1 keeps their order."""
    skip: int = Field(default=0, ge=0)
    """Rows to leave out, from the first."""
    documents: int | None = Field(default=None, gt=0)
    """Maximum number of rows, after those left out; null for all."""


class DocumentsConfig(Config):
    """A source of documents: files and folders, or a dataset."""

    paths: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(default=None, min_length=1)
    """Files and folders: text and JSON lines (.jsonl), each also as .gz, .xz, .bz2 or .zst; .parquet and .arrow; or
    token files (.tokens) of `seqmix tokenize`. Null reads Python's own standard library, which every machine has."""
    dataset: DatasetConfig | None = None
    """A dataset instead of paths."""
    glob: str = "**/*"
    """Pattern of the files to read in a folder; hidden files are never read."""
    text_field: str | None = Field(default="text", min_length=1)
    """The field with the text, in a JSON line or a row of a table or dataset; null reads .jsonl files as plain text."""
    encoding: str = UTF8
    """Encoding of text files and JSON lines, such as latin-1. Files that are not UTF-8 are refused, but for few odd
    bytes; `bytes` takes any file as it is."""

    @property
    def parts(self) -> "Sequence[DocumentsConfig]":
        """The sources of documents, one after another."""
        return (self,)

    @property
    def streamed(self) -> bool:
        """Whether training reads rows as it needs them."""
        return self.dataset is not None and self.dataset.streaming

    @field_validator("glob")
    @classmethod
    def _glob_is_relative(cls, glob: str) -> str:
        try:
            list(Path("/nonexistent").glob(glob))
            if glob.count("**") > MOST_FOLDERS:
                raise ValueError(f"it has more than {MOST_FOLDERS} times **, each of which walks all folders again")
        except (ValueError, NotImplementedError, IndexError) as error:
            raise ValueError(
                f"glob is a pattern such as **/*.txt, relative to the folder; {glob!r} is not: {error}"
            ) from error
        return glob

    @field_validator("encoding")
    @classmethod
    def _encoding_exists(cls, encoding: str) -> str:
        if encoding == BYTES:
            return encoding
        try:
            "".encode(encoding)  # refuses codecs that are not encodings of text
        except LookupError as error:
            raise ValueError(f"encoding is bytes or an encoding of text, such as latin-1: {error}") from error
        return UTF8 if codecs.lookup(encoding).name == UTF8 else encoding

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dataset is None:
            return self
        if self.paths is not None:
            raise ValueError("paths and dataset are two sources: set only one of them")
        if self.text_field is None:
            raise ValueError("text_field must name the dataset's field with the text, and is null")
        for name in ("glob", "encoding"):
            if getattr(self, name) != DocumentsConfig.model_fields[name].default:
                raise ValueError(f"{name} is of files, and a dataset has rows: leave it out")
        return self


class SourceConfig(DocumentsConfig):
    """A source of documents of its own: it needs paths or a dataset."""

    @model_validator(mode="after")
    def _is_named(self) -> Self:
        if self.paths is None and self.dataset is None:
            raise ValueError("a source of its own needs paths or a dataset")
        return self


class WeightedSourceConfig(SourceConfig):
    """One of the sources of a mixture."""

    weight: float = Field(gt=0, allow_inf_nan=False)
    """Its share of the training tokens, relative to the other weights."""


class CorpusConfig(DocumentsConfig, DataConfig):
    """A text, as documents, each of which starts with a begin token."""

    sources: tuple[WeightedSourceConfig, ...] | None = Field(default=None, min_length=1)
    """Several sources with weights, instead of paths or a dataset: every sequence is of one of them."""
    validation: SourceConfig | None = None
    """Documents of the validation split, with the fields of a source but its weight; null takes it from the text."""
    tokenizer: str = Field(default="bytes", min_length=1)
    """`bytes`, or a tokenizer.json of Hugging Face, or a folder or a file of `seqmix export` that holds one."""
    begin_token: str | None = None
    """The token of that tokenizer that opens a document, such as "<s>"; null for one that follows its last token."""
    split: Literal["auto", "by_document", "by_file", "tail"] = "auto"
    """Validation split: `by_document` holds out documents by a hash of their text, so that duplicates share a split;
    `by_file` files, by a hash of their names; `tail` the end of every document; `auto` is tail for one document,
    by_file for text files, else by_document."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the documents or files (for tail: of every document) in the validation split."""

    @model_validator(mode="after")
    def _bytes_have_their_begin_token(self) -> Self:
        if self.begin_token is not None and self.tokenizer == ByteTokenizer.identity:
            raise ValueError(f"begin_token = {self.begin_token!r} is for a tokenizer in a file; bytes have their own")
        return self

    @model_validator(mode="after")
    def _splits_are_clear(self) -> Self:
        fields = type(self).model_fields
        changed = {name for name in fields if getattr(self, name) != fields[name].default}
        if self.sources is not None and (given := changed & DocumentsConfig.model_fields.keys()):
            raise ValueError(f"with data.sources, every source has its own {min(given)}: set it there")
        if self.validation is not None and (given := changed & {"split", "validation_fraction"}):
            raise ValueError(f"data.validation is the validation split: leave out data.{min(given)}")
        for part in self.parts if self.validation is None else ():
            if part.dataset is not None and part.streamed:
                raise ValueError(
                    f"the dataset {part.dataset.path} is streamed, so name the validation split: data.validation="
                    "{dataset: {path: ..., split: ...}}, or with documents: N its first rows, which skip: N leaves out"
                )
            if part.dataset is not None and self.split == "by_file":
                raise ValueError("split by_file needs files, and a dataset has rows: use by_document")
        return self

    @property
    def parts(self) -> Sequence[DocumentsConfig]:
        return self.sources or (self,)

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the parts."""
        return tuple(source.weight for source in self.sources or ()) or (1.0,)

    def tokenizer_of(self, run: Path | None = None, vocab_size: int | None = None) -> Tokenizer:
        """The tokenizer of the text; a run's own copy takes precedence.

        Raises:
            SeqmixError: it cannot be read, or has more tokens than the `vocab_size` of a model.
        """
        copy = None if run is None or self.tokenizer == ByteTokenizer.identity else run / TOKENIZER_FILE
        tokenizer = load_tokenizer(copy if copy is not None and copy.is_file() else self.tokenizer, self.begin_token)
        if vocab_size is not None and vocab_size < tokenizer.vocab_size:
            raise SeqmixError(
                f"the tokenizer {self.tokenizer} has {tokenizer.vocab_size} tokens, including the begin token, and "
                f"model.vocab_size is {vocab_size}: set model.vocab_size={tokenizer.vocab_size}"
            )
        return tokenizer

    def require_fit(self, vocab_size: int) -> None:
        """Refuse a vocabulary smaller than bytes; a tokenizer in a file is not read here."""
        if self.tokenizer == ByteTokenizer.identity and vocab_size < ByteTokenizer.vocab_size:
            raise ValueError(
                f"text as bytes has {ByteTokenizer.vocab_size} tokens (256 bytes and the begin token), "
                f"and model.vocab_size is {vocab_size}"
            )

    def require_files(self, vocab_size: int) -> None:
        self.tokenizer_of(vocab_size=vocab_size)
