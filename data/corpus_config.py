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
"""Default encoding of text files."""
BYTES = "bytes"
"""Value of `encoding` that reads any file unchanged, without decoding."""
MAX_RECURSIVE_WILDCARDS = 2
"""Maximum number of `**` in a glob."""


class DatasetConfig(Config):
    """A dataset of Hugging Face `datasets`: each row is a document."""

    path: str = Field(min_length=1)
    """A folder that `save_to_disk` wrote, or the first argument of `load_dataset`: a name on the hub, a folder, or a
    format such as `parquet`."""
    name: str | None = None
    """Name of the dataset's configuration (subset), if it has several."""
    data_files: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(default=None, min_length=1)
    """Files of the dataset to read, or glob patterns; null reads all."""
    split: str = Field(default="train", min_length=1)
    """Split of the dataset to read; `data.split` divides it further into training and validation split."""
    streaming: bool = False
    """True to stream rows during training instead of loading the dataset into memory, starting over at its end.
    Checkpoints save the position in the stream. Needs `data.validation`."""
    shuffle_buffer: int = Field(default=1000, gt=0)
    """Rows that are shuffled together when training streams them; 1 keeps their order."""
    skip: int = Field(default=0, ge=0)
    """Number of rows to skip at the start."""
    documents: int | None = Field(default=None, gt=0)
    """Maximum number of rows to read after the skipped ones; null reads all."""


class DocumentsConfig(Config):
    """A source of documents: files and folders, or a dataset."""

    paths: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(default=None, min_length=1)
    """Files and folders to read: text and JSON lines (.jsonl), plain or compressed as .gz, .xz, .bz2 or .zst; .parquet
    and .arrow; or token files (.tokens) written by `seqmix tokenize`. Null reads the source of Python's standard
    library, which every machine has."""
    dataset: DatasetConfig | None = None
    """A Hugging Face dataset to read instead of `paths`."""
    glob: str = "**/*"
    """Pattern that selects the files of a folder; hidden files are never read."""
    text_field: str | None = Field(default="text", min_length=1)
    """Field or column that holds the text of a JSON line, table row or dataset row; null reads .jsonl files as plain
    text."""
    encoding: str = UTF8
    """Encoding of text files and JSON lines, such as `latin-1`. With the default, files that are not UTF-8 text raise
    an error, except for a few stray bytes; `bytes` reads any file unchanged."""

    @property
    def parts(self) -> "Sequence[DocumentsConfig]":
        """Sources of documents, in order."""
        return (self,)

    @property
    def streamed(self) -> bool:
        """True if training streams the rows of the dataset."""
        return self.dataset is not None and self.dataset.streaming

    @field_validator("glob")
    @classmethod
    def _glob_is_relative(cls, glob: str) -> str:
        try:
            list(Path("/nonexistent").glob(glob))
            if (count := glob.count("**")) > MAX_RECURSIVE_WILDCARDS:
                raise ValueError(f"at most {MAX_RECURSIVE_WILDCARDS} ** are allowed, got {count}")
        except (ValueError, NotImplementedError, IndexError) as error:
            raise ValueError(
                f"glob must be a pattern relative to the folder, such as **/*.txt, got {glob!r}: {error}"
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
            raise ValueError(f"encoding must be bytes or a text encoding such as latin-1: {error}") from error
        return UTF8 if codecs.lookup(encoding).name == UTF8 else encoding

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dataset is None:
            return self
        if self.paths is not None:
            raise ValueError("paths and dataset cannot be combined: set only one of them")
        if self.text_field is None:
            raise ValueError("text_field must name the dataset's column with the text, got null")
        for name in ("glob", "encoding"):
            if getattr(self, name) != DocumentsConfig.model_fields[name].default:
                raise ValueError(f"{name} applies to files only, not to a dataset: leave it out")
        return self


class SourceConfig(DocumentsConfig):
    """A separate source of documents, which must set paths or a dataset."""

    @model_validator(mode="after")
    def _is_named(self) -> Self:
        if self.paths is None and self.dataset is None:
            raise ValueError("a separate source needs paths or a dataset: set one of them")
        return self


class WeightedSourceConfig(SourceConfig):
    """One of the weighted sources of a mixture."""

    weight: float = Field(gt=0, allow_inf_nan=False)
    """Share of this source in the training tokens, relative to the other sources' weights."""


class CorpusConfig(DocumentsConfig, DataConfig):
    """A text as documents, each of which starts with a begin token."""

    sources: tuple[WeightedSourceConfig, ...] | None = Field(default=None, min_length=1)
    """Several weighted sources, instead of paths or a dataset; every training sequence comes from one of them."""
    validation: SourceConfig | None = None
    """Separate documents for the validation split, with the fields of a source except `weight`; null splits the
    training text."""
    tokenizer: str = Field(default="bytes", min_length=1)
    """`bytes`, or the path of a Hugging Face tokenizer.json, or a folder or `seqmix export` file that contains one."""
    begin_token: str | None = None
    """Token of the tokenizer's vocabulary that starts every document, such as "<s>"; null adds a new token to it."""
    split: Literal["auto", "by_document", "by_file", "tail"] = "auto"
    """Validation split. `by_document` holds out documents by a hash of their text, so duplicates share a split;
    `by_file` holds out files by a hash of their names; `tail` holds out the end of every document. `auto` is `tail` for
    a single document, `by_file` for text files, and `by_document` otherwise."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the documents or files that is held out for validation; with `tail`, the share of every document."""
    test_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share that neither training nor validation reads. It is the part that a run with `validation_fraction` equal to
    this share, and no `test_fraction`, validates on. So if you tune with `test_fraction: 0.1`, the default validation
    split stays unseen."""

    @model_validator(mode="after")
    def _bytes_have_their_begin_token(self) -> Self:
        if self.begin_token is not None and self.tokenizer == ByteTokenizer.identity:
            raise ValueError(
                f"begin_token = {self.begin_token!r} needs a tokenizer from a file; the byte tokenizer has its own "
                "begin token: leave out begin_token, or set tokenizer"
            )
        return self

    @model_validator(mode="after")
    def _splits_are_clear(self) -> Self:
        fields = type(self).model_fields
        changed = {name for name in fields if getattr(self, name) != fields[name].default}
        if self.sources is not None and (offenders := changed & DocumentsConfig.model_fields.keys()):
            raise ValueError(f"data.sources replaces {min(offenders)}: set {min(offenders)} in each of the sources")
        if self.validation is not None and (offenders := changed & {"split", "test_fraction", "validation_fraction"}):
            raise ValueError(f"data.validation replaces the split: leave out data.{min(offenders)}")
        if self.test_fraction + self.validation_fraction >= 1:
            raise ValueError(
                f"test_fraction = {self.test_fraction} and validation_fraction = {self.validation_fraction} leave no "
                "text for training: lower one of them"
            )
        for part in self.parts if self.validation is None else ():
            if part.dataset is not None and part.streamed:
                raise ValueError(
                    f"the dataset {part.dataset.path} is streamed and needs a separate validation split: set "
                    "data.validation={dataset: {path: ..., split: ...}}; to use the first N rows, set documents: N "
                    "there and skip: N in the training dataset"
                )
            if part.dataset is not None and self.split == "by_file":
                raise ValueError("split by_file needs files, got a dataset: use by_document")
        return self

    @property
    def parts(self) -> Sequence[DocumentsConfig]:
        return self.sources or (self,)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each source in `parts`; (1.0,) for a single source."""
        return tuple(source.weight for source in self.sources or ()) or (1.0,)

    def tokenizer_of(self, run: Path | None = None, vocab_size: int | None = None) -> Tokenizer:
        """Return the tokenizer of the text.

        Args:
            run: a run directory; its copy of the tokenizer takes precedence over the configured file.
            vocab_size: the model's vocabulary size to check the tokenizer against, if any.

        Raises:
            SeqmixError: the tokenizer cannot be read, or has more than `vocab_size` tokens.
        """
        copy = None if run is None or self.tokenizer == ByteTokenizer.identity else run / TOKENIZER_FILE
        tokenizer = load_tokenizer(copy if copy is not None and copy.is_file() else self.tokenizer, self.begin_token)
        if vocab_size is not None and vocab_size < tokenizer.vocab_size:
            raise SeqmixError(
                f"the tokenizer {self.tokenizer} needs model.vocab_size of at least {tokenizer.vocab_size}, including "
                f"the begin token, got {vocab_size}: set model.vocab_size={tokenizer.vocab_size}"
            )
        return tokenizer

    def require_fit(self, vocab_size: int) -> None:
        """Check that the model's vocabulary holds all bytes; a tokenizer in a file is checked when it is read."""
        if self.tokenizer == ByteTokenizer.identity and vocab_size < ByteTokenizer.vocab_size:
            raise ValueError(
                f"text as bytes has {ByteTokenizer.vocab_size} tokens (256 bytes and the begin token), got "
                f"model.vocab_size {vocab_size}: set model.vocab_size={ByteTokenizer.vocab_size}"
            )

    def require_files(self, vocab_size: int) -> None:
        self.tokenizer_of(vocab_size=vocab_size)
