"""The batches of a text: cut from its stream at places of their own, or each where the one before ended."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..models import Tokenizer
from ..registry import SeqmixError
from .batches import cut, evaluation_batches, most_documents, pack, training_batch
from .contiguous import Windows, contiguous_windows
from .corpus import Corpus, read_corpus
from .kinds.text import TextConfig
from .source import Batch, Examples, Packed, Source, share

if TYPE_CHECKING:
    from ..training.config import RunConfig


class Text(Source):
    """A text, opened.

    Args:
        config: how sequences are cut from it.
        corpus: its two streams.
        carried: whether a step goes on where the one before ended.
        lengths: further lengths of sequences at which it is evaluated.
    """

    def __init__(
        self, config: TextConfig, corpus: Corpus, *, carried: bool = False, lengths: tuple[int, ...] = ()
    ) -> None:
        self.config, self.corpus, self.carried = config, corpus, carried
        self.name, self.tokenizer, self.vocab_size = corpus.name, corpus.tokenizer, corpus.tokenizer.vocab_size
        self.bytes_per_token, self.unigram_entropy = corpus.bytes_per_token, corpus.unigram_entropy
        self.begin, self.digest = corpus.tokenizer.begin, corpus.digest
        self.most_documents: dict[int, int] = {}
        """Of a sequence, by its length, where documents are packed."""
        for length in (config.sequence_length, *lengths) if config.packing else ():
            streams = (corpus.train, corpus.validation)
            self.most_documents[length] = max(most_documents(tokens, length, self.begin) for tokens in streams)

    @property
    def summary(self) -> str:
        """Documents, and tokens on both sides."""
        corpus = self.corpus
        return (
            f"{corpus.documents:,} documents, {len(corpus.train):,} tokens to learn, "
            f"{len(corpus.validation):,} held out ({corpus.split})"
        )

    def training_batch(self, step: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> Batch:
        """The sequences of one step, in the configured order."""
        tokens, length = self.corpus.train, self.config.sequence_length
        if self.carried:
            starts = self._windows(step, batch_size, seed).starts
            return cut(tokens, starts[share(batch_size, rank, world_size)], length, self.begin)
        return training_batch(
            tokens,
            length,
            batch_size,
            seed=seed,
            step=step,
            order=self.config.order,
            begin=self.begin,
            rank=rank,
            world_size=world_size,
        )

    def evaluation_batches(self, batch_size: int, limit: int | None, length: int | None = None) -> Iterator[Examples]:
        """Sequences side by side over the stream held out."""
        length = length or self.config.sequence_length
        for batch in evaluation_batches(self.corpus.validation, length, batch_size, limit, begin=self.begin):
            yield Examples(batch)

    def goes_on(self, step: int, batch_size: int, seed: int) -> bool:
        """Whether a step is within the lanes of the step before."""
        return self.carried and not self._windows(step, batch_size, seed).first

    def packed(self, batch: Batch) -> Packed | None:
        """The batch in one row, cut into documents, where that is configured."""
        most = self.most_documents.get(batch.inputs.shape[1])
        return None if most is None else pack(batch, most, self.begin)

    def _windows(self, step: int, batch_size: int, seed: int) -> Windows:
        tokens, length = len(self.corpus.train), self.config.sequence_length
        return contiguous_windows(tokens, length, batch_size, seed=seed, step=step)


def open_text(config: TextConfig, run: "RunConfig", tokenizer: Tokenizer) -> Text:
    """Read a text, and find out before anything is written what would fail later.

    Raises:
        SeqmixError: it cannot be read, or is too short for what training asks.
    """
    corpus, settings = read_corpus(config, tokenizer), run.training
    if settings.carry_state:
        contiguous_windows(len(corpus.train), config.sequence_length, settings.batch_size, seed=run.seed, step=0)
    for length in settings.evaluation_lengths:
        if len(corpus.validation) <= length:
            raise SeqmixError(
                f"training.evaluation_lengths has {length}, which takes {length + 1} tokens of validation text, "
                f"and {corpus.name} has {len(corpus.validation)}"
            )
    return Text(config, corpus, carried=settings.carry_state, lengths=settings.evaluation_lengths)
