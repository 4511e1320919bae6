"""Which text a run reads: its documents, their tokenizer, and how they are split for validation."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..models import TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from ..registry import Config, SeqmixError
from .source import DataConfig


class DatasetConfig(Config):
    """A data set of Hugging Face `datasets`: each row is a document."""

    path: str = Field(min_length=1)
    """A folder that `save_to_disk` wrote, or what `load_dataset` takes: a name on the hub, or a folder."""
    name: str | None = None
    """The data set's own configuration, where it has several."""
    split: str = Field(default="train", min_length=1)
    """Which of the data set's splits is read; `data.split` chooses the validation split of it."""
    streaming: bool = False
    """Whether rows are fetched as they are read, and nothing is kept on disk."""
    documents: int | None = Field(default=None, gt=0)
    """Rows that are read at most, from the first on; null for all."""


class CorpusConfig(DataConfig):
    """A text, as documents; each is opened by a begin token."""

    paths: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(default=None, min_length=1)
    """Files and folders: text, JSON lines (.jsonl), or token files (.tokens) that `seqmix tokenize` wrote; null takes
    the source of Python's own standard library, which every machine has."""
    dataset: DatasetConfig | None = None
    """A data set in place of paths."""
    glob: str = "**/*"
    """Which files of a folder are read; hidden files never are."""
    text_field: str | None = Field(default="text", min_length=1)
    """The field of a JSON line or of a data set's row that holds the text; null reads .jsonl files as plain text."""
    tokenizer: str = Field(default="bytes", min_length=1)
    """`bytes`, or a tokenizer.json of Hugging Face; a token after its last one opens documents."""
    split: Literal["auto", "by_document", "by_file", "tail"] = "auto"
    """`by_document` holds out whole documents, chosen by a hash of their text, so that a document and its exact copies
    lie on one side; `by_file` whole files, by a hash of their names; `tail` the end of every document; `auto` is tail
    where there is one document, by_file where all are text files, else by_document."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the documents or files (or of every document) in the validation split."""

    @field_validator("glob")
    @classmethod
    def _glob_is_relative(cls, glob: str) -> str:
        try:
            list(Path("/nonexistent").glob(glob))
        except (ValueError, NotImplementedError, IndexError) as error:
            raise ValueError(
                f"glob is a pattern such as **/*.txt, relative to the folder; {glob!r} is none: {error}"
            ) from error
        return glob

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dataset is None:
            return self
        if self.paths is not None:
            raise ValueError("paths and dataset are two sources: give one of them")
        if self.text_field is None:
            raise ValueError("text_field names the field of a dataset's rows that holds the text, and is null")
        if self.split == "by_file":
            raise ValueError("split by_file holds out files, and a dataset has none: by_document holds out its rows")
        return self

    def tokenizer_of(self, run: Path | None = None, vocab_size: int | None = None) -> Tokenizer:
        """The tokenizer of the text: a run's own copy, where it has one.

        Raises:
            SeqmixError: it cannot be read, or has more tokens than the `vocab_size` of a model.
        """
        copy = None if run is None or self.tokenizer == ByteTokenizer.identity else run / TOKENIZER_FILE
        tokenizer = load_tokenizer(copy if copy is not None and copy.is_file() else self.tokenizer)
        if vocab_size is not None and vocab_size < tokenizer.vocab_size:
            raise SeqmixError(
                f"the tokenizer {self.tokenizer} has {tokenizer.vocab_size} tokens, the begin token among them, and "
                f"model.vocab_size is {vocab_size}"
            )
        return tokenizer

    def require_fit(self, vocab_size: int) -> None:
        """Refuse a model that lacks bytes; a vocabulary in a file is not read yet: a configuration may lack it."""
        if self.tokenizer == ByteTokenizer.identity and vocab_size < ByteTokenizer.vocab_size:
            raise ValueError(
                f"text as bytes has {ByteTokenizer.vocab_size} tokens (256 bytes and the begin token), "
                f"and model.vocab_size is {vocab_size}"
            )

    def require_files(self, vocab_size: int) -> None:
        self.tokenizer_of(vocab_size=vocab_size)
