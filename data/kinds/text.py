"""Text: documents, of which some are held out, and from which sequences are cut."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from ...models import TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer
from ...registry import Config, SeqmixError
from ..source import DataConfig, Source

if TYPE_CHECKING:
    from ...training.config import RunConfig


class DatasetConfig(Config):
    """A data set of Hugging Face `datasets`: each row is a document."""

    path: str = Field(min_length=1)
    """A folder that `save_to_disk` wrote, or what `load_dataset` takes: a name on the hub, or a folder."""
    name: str | None = None
    """The data set's own configuration, where it has several."""
    split: str = Field(default="train", min_length=1)
    """Which of the data set's splits is read; what is held out of it is `data.split`'s choice."""
    streaming: bool = False
    """Whether rows are fetched as they are read, and nothing is kept on disk."""
    documents: int | None = Field(default=None, gt=0)
    """Rows that are read at most, from the first on; null for all."""


class TextConfig(DataConfig):
    """A text, as documents; each is opened by a begin token."""

    kind: Literal["text"] = "text"
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
    """`bytes`, or a tokenizer.json of Hugging Face; a token behind its last one opens documents."""
    split: Literal["auto", "by_document", "by_file", "tail"] = "auto"
    """`by_document` holds out whole documents, chosen by a hash of their text, so that a document and its exact copies
    lie on one side; `by_file` whole files, by a hash of their names; `tail` the end of every document; `auto` is tail
    where there is one document, by_file where all are text files, else by_document."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the documents or files (or of every document) held out."""
    packing: bool = False
    """Whether every document of a sequence starts from nothing: no state crosses a border. Needs mixers that declare
    packing. Otherwise a sequence is read through, and only the prediction of a begin token is left out."""
    order: Literal["random_windows", "epochs"] = "random_windows"
    """`random_windows` cuts sequences from random places, anew in every step; `epochs` cuts the text into sequences
    once and takes each once an epoch, in an order of its own."""

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

    def open(self, config: "RunConfig", run: Path | None = None) -> Source:
        """Read and split it."""
        from ..text import open_text

        tokenizer = self.tokenizer_of(run)
        self._require_vocabulary(tokenizer, config.model.vocab_size)
        return open_text(self, config, tokenizer)

    def tokenizer_of(self, run: Path | None = None) -> Tokenizer:
        """The tokenizer of the text: a run's own copy, where it has one."""
        own = None if run is None else run / TOKENIZER_FILE
        copied = self.tokenizer != ByteTokenizer.identity and own is not None and own.is_file()
        return load_tokenizer(own if copied and own is not None else self.tokenizer)

    def require_files(self, config: "RunConfig") -> None:
        """Refuse a vocabulary that cannot be read, or is larger than the model's."""
        self._require_vocabulary(self.tokenizer_of(), config.model.vocab_size)

    def require_fit(self, config: "RunConfig") -> None:
        """Refuse a model that lacks bytes, and mixers that cannot read the text as they are to."""
        model, carried = config.model, config.training.carry_state
        # a vocabulary in a file is not read before training starts: a configuration may be looked at without it
        if self.tokenizer == ByteTokenizer.identity and model.vocab_size < ByteTokenizer.vocab_size:
            raise ValueError(
                f"text as bytes has {ByteTokenizer.vocab_size} tokens (256 bytes and the begin token), "
                f"and model.vocab_size is {model.vocab_size}"
            )
        if carried and self.packing:
            raise ValueError("data.packing starts every document from nothing, and training.carry_state does not")
        if carried and self.order == "epochs":
            raise ValueError("training.carry_state reads text in its own order, and data.order epochs is another")
        for name in dict.fromkeys(model.layers):
            mixer = model.blocks[name].mixer
            if carried and mixer.traits.state == "growing":
                raise ValueError(
                    f"training.carry_state needs mixers whose state has a constant size, and that of "
                    f"model.blocks.{name}.mixer ({mixer.kind}) grows with the text"
                )
            if self.packing and not mixer.traits.packing:
                raise ValueError(
                    f"data.packing needs mixers that declare packing, and {mixer.kind} of model.blocks.{name} does "
                    "not: set data.packing to false, or take another mixer"
                )

    def _require_vocabulary(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        if vocab_size < tokenizer.vocab_size:
            raise SeqmixError(
                f"the tokenizer {self.tokenizer} has {tokenizer.vocab_size} tokens, the begin token among them, and "
                f"model.vocab_size is {vocab_size}"
            )
