"""Text: sequences cut from documents, split for training and validation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ...registry import SeqmixError
from ..batches import evaluation_batches, most_documents, pack, training_batch
from ..corpus import Corpus, read_corpus
from ..corpus_config import CorpusConfig
from ..order import Windows, contiguous_windows
from ..source import Batch, Examples, Packed, Source


class TextConfig(CorpusConfig):
    """A text, as documents; each is opened by a begin token."""

    is_text = True
    kind: Literal["text"] = "text"
    packing: bool = False
    """Whether every document of a sequence starts from nothing: no state crosses a document boundary. Needs mixers that
    declare packing. Otherwise a sequence is read through, and only the prediction of a begin token is left out."""
    order: Literal["random_windows", "epochs"] = "random_windows"
    """`random_windows` cuts sequences from random places, others in every step; `epochs` cuts the text into sequences
    once and takes each once an epoch, in an order of its own."""

    def open(self, vocab_size: int, run: Path | None = None) -> Source:
        """Read and split it."""
        return Text(self, read_corpus(self, self.fitting_tokenizer(vocab_size, run)))


class Text(Source):
    """A text, opened.

    Args:
        config: how sequences are cut from it.
        corpus: its two streams.
        carried: whether a step goes on where the one before ended.
    """

    def __init__(self, config: TextConfig, corpus: Corpus, *, carried: bool = False) -> None:
        self.config, self.corpus, self.carried = config, corpus, carried
        self.name, self.tokenizer, self.vocab_size = corpus.name, corpus.tokenizer, corpus.tokenizer.vocab_size
        self.bytes_per_token, self.unigram_entropy = corpus.bytes_per_token, corpus.unigram_entropy
        self.begin, self.digest = corpus.tokenizer.begin, corpus.digest
        self._most_documents: dict[int, int] = {}

    @property
    def summary(self) -> str:
        """Documents, and tokens on both sides."""
        corpus = self.corpus
        return (
            f"{corpus.documents:,} documents, {len(corpus.train):,} training tokens, "
            f"{len(corpus.validation):,} validation tokens ({corpus.split})"
        )

    def training_batch(self, step: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The sequences of one step, in the configured order."""
        tokens, length = self.corpus.train, self.config.sequence_length
        order, begin = "contiguous" if self.carried else self.config.order, self.begin
        place = {"seed": seed, "step": step, "rank": rank, "world_size": world_size}
        return training_batch(tokens, length, batch_size, order=order, begin=begin, **place)

    def evaluation_batches(self, batch_size: int, limit: int | None, length: int | None = None) -> Iterator[Examples]:
        """Sequences side by side over the validation split."""
        length = length or self.config.sequence_length
        for batch in evaluation_batches(self.corpus.validation, length, batch_size, limit, begin=self.begin):
            yield Examples(batch)

    def goes_on(self, step: int, batch_size: int, seed: int) -> bool:
        """Whether a step is within the lanes of the step before."""
        return self.carried and not self._windows(step, batch_size, seed).first

    def contiguous(self, batch_size: int) -> "Text":
        """The text, read side by side in as many lanes as a batch has rows."""
        text = Text(self.config, self.corpus, carried=True)
        text._windows(0, batch_size, seed=0)
        return text

    def require_evaluation_length(self, length: int) -> None:
        """Refuse a validation split that is no longer than a sequence."""
        if len(self.corpus.validation) <= length:
            raise SeqmixError(
                f"training.evaluation_lengths has {length}, which takes {length + 1} tokens of validation text, "
                f"and {self.name} has {len(self.corpus.validation)}"
            )

    def packed(self, batch: Batch) -> Packed:
        """The batch in one row, cut into documents, where that is configured."""
        if not self.config.packing:
            return super().packed(batch)
        return pack(batch, self.most_documents(batch.inputs.shape[1]), self.begin)

    def most_documents(self, length: int) -> int:
        """Documents in a sequence of a length at most; counted once."""
        if length not in self._most_documents:
            streams = (self.corpus.train, self.corpus.validation)
            self._most_documents[length] = max(most_documents(tokens, length, self.begin) for tokens in streams)
        return self._most_documents[length]

    def _windows(self, step: int, batch_size: int, seed: int) -> Windows:
        tokens, length = len(self.corpus.train), self.config.sequence_length
        return contiguous_windows(tokens, length, batch_size, seed=seed, step=step)
