"""Text data: sequences cut from the training and validation split of a corpus."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ...models import IGNORED
from ...registry import SeqmixError
from ..corpus import Corpus, read_corpus
from ..corpus_config import CorpusConfig
from ..files import source_name
from ..loss_slices import COUNTED_TOKENS, Slices, SlicesConfig
from ..order import contiguous_starts, lane_windows, mixture
from ..packing import most_documents, pack
from ..sequences import PADDING, Cut, Streamed, Tokens, windows
from ..source import Batch, Examples, LossPartition, Packed, Source, share


class TextConfig(CorpusConfig):
    """A text as documents, each of which starts with a begin token."""

    is_text = True
    kind: Literal["text"] = "text"
    packing: bool = False
    """True to start every document of a sequence from an empty state, so that no state crosses a document boundary; it
    needs mixers that declare packing. If False, documents in the same sequence see each other. Begin tokens are never
    targets."""
    order: Literal["random_windows", "epochs"] = "random_windows"
    """Order of the sequences: `random_windows` cuts them at random positions; `epochs` cuts the text once and reads
    every sequence once per epoch, reshuffled every epoch. A streamed dataset ignores it and uses its own order."""
    slices: SlicesConfig | None = None
    """Report the evaluation loss by position, and separately for tokens that complete an n-gram seen earlier in the
    sequence (recall hits); null reports the mean only. Slows evaluations down."""

    def open(self, vocab_size: int, run: Path | None = None) -> Source:
        return Text(self, read_corpus(self, self.tokenizer_of(run, vocab_size)))


class Text(Source):
    """An opened text.

    Args:
        config: the configuration: sequence length, order, packing and slices.
        corpus: the training and validation split.
        continues_sequences: True if each step continues the sequences of the previous step (training.carry_state);
            False for the configured order.
    """

    def __init__(self, config: TextConfig, corpus: Corpus, *, continues_sequences: bool = False) -> None:
        self.config = config
        self.corpus = corpus
        self.continues_sequences = continues_sequences
        self.name = corpus.name
        self.tokenizer = corpus.tokenizer
        self.vocab_size = corpus.tokenizer.vocab_size
        self.bytes_per_token = corpus.bytes_per_token
        self.unigram_entropy = corpus.unigram_entropy
        self.begin = corpus.tokenizer.begin
        self.digest = corpus.digest
        self._most_documents: dict[int, int] = {}
        self._slices: Slices | None = None
        self._sources: list[Cut | Streamed] = []
        length = config.sequence_length
        start = 0
        for number, (part, size) in enumerate(zip(config.parts, corpus.sizes, strict=True)):
            if part.streamed:
                self._sources.append(Streamed(part, corpus.tokenizer, length))
            else:
                span = range(start, start + size)
                start += size
                self._sources.append(Cut(corpus.train, span, length, config.order, number))

    @property
    def summary(self) -> str:
        corpus = self.corpus
        parts = self.config.parts
        streamed = [part.dataset.path for part in parts if part.dataset is not None and part.streamed]
        shares = f"; {len(parts)} sources, {' : '.join(f'{x:g}' for x in self.config.weights)}" if parts[1:] else ""
        return (
            f"{corpus.documents:,} document{'s' * (corpus.documents != 1)}, "
            f"{len(corpus.train):,} training tokens{shares}"
            f"{''.join(f', {name} streamed' for name in streamed)}, "
            f"{len(corpus.validation):,} validation tokens ({corpus.split})"
        )

    def training_batch(self, step: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return the sequences of one step; the last sequence of an epoch is padded, with ignored targets."""
        tokens = self.corpus.train
        length = self.config.sequence_length
        rows = share(batch_size, rank, world_size)
        if self.continues_sequences:
            starts = contiguous_starts(len(tokens), length, batch_size, seed=seed, step=step)
            return cut(tokens, starts[rows], length, self.begin)  # never packed
        sources, numbers = mixture(self.config.weights, batch_size, seed=seed, step=step)
        of_rank = np.zeros(batch_size, dtype=bool)
        of_rank[rows] = True
        sequences = np.empty((batch_size, length + 1), dtype=np.int64)
        for number in np.unique(sources).tolist():
            source = self._sources[number]
            of_source = sources == number
            sequences[of_source & of_rank] = source.read(numbers[of_source], of_rank[of_source], seed=seed, step=step)
        return self._check_documents(as_batch(sequences[rows], self.begin))

    def origin(self, step: int, batch_size: int, seed: int, row: int, token: int) -> str | None:
        if self.continues_sequences:
            length = self.config.sequence_length
            size = len(self.corpus.train)
            start = contiguous_starts(size, length, batch_size, seed=seed, step=step)[row]
        else:
            sources, numbers = mixture(self.config.weights, batch_size, seed=seed, step=step)
            source = self._sources[sources[row]]
            of_source = sources == sources[row]
            if isinstance(source, Streamed):
                return source_name(source.config)
            start = source.starts(numbers[of_source], seed=seed, step=step)[of_source[:row].sum()]
        return self.corpus.origin(int(start) + token)

    def evaluation_origin(self, batch_size: int, limit: int | None, length: int, row: int, token: int) -> str | None:
        starts = self._evaluation_starts(batch_size, limit, length)
        # rows beyond the last sequence are padding that repeats the first sequences
        return self.corpus.origin(int(starts[row % len(starts)]) + token, "validation")

    def state_dict(self) -> dict[str, Any] | None:
        places = [source.place if isinstance(source, Streamed) else None for source in self._sources]
        return {"places": places} if any(places) else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if len(state["places"]) == len(self._sources):
            for source, place in zip(self._sources, state["places"], strict=True):
                if isinstance(source, Streamed):
                    source.resume(place)

    def evaluation_batches(self, batch_size: int, limit: int | None, length: int | None = None) -> Iterator[Examples]:
        """Yield contiguous sequences of the validation split; the last batch is padded with ignored rows."""
        tokens = self.corpus.validation
        length = length or self.config.sequence_length
        starts = self._evaluation_starts(batch_size, limit, length)
        for at in range(0, len(starts), batch_size):
            part = starts[at : at + batch_size]
            batch = cut(tokens, np.resize(part, batch_size), length, self.begin)
            batch.targets[len(part) :] = IGNORED
            yield Examples(self._check_documents(batch))

    def _evaluation_starts(self, batch_size: int, limit: int | None, length: int) -> np.ndarray:
        """Return the positions in the validation split at which evaluated sequences start; see `evaluation_batches`."""
        starts = np.arange(0, len(self.corpus.validation) - length, length)
        if limit is not None and limit * batch_size < len(starts):
            starts = starts[np.linspace(0, len(starts) - 1, limit * batch_size).round().astype(int)]
        return starts

    def goes_on(self, step: int, batch_size: int, seed: int) -> bool:
        if not self.continues_sequences:
            return False
        return step % lane_windows(len(self.corpus.train), self.config.sequence_length, batch_size) != 0

    def contiguous(self, batch_size: int) -> "Text":
        """Return the same text, read in one contiguous lane per row of a batch."""
        if self.config.sources or not len(self.corpus.train):
            raise SeqmixError(
                "training.carry_state needs a single text that is not streamed: leave out data.sources and streaming"
            )
        text = Text(self.config, self.corpus, continues_sequences=True)
        text.goes_on(0, batch_size, seed=0)  # raises if the text is too short
        return text

    def require_evaluation_length(self, length: int) -> None:
        if len(self.corpus.validation) <= length:
            raise SeqmixError(
                f"training.evaluation_lengths has {length}, which needs {length + 1} validation tokens, got "
                f"{len(self.corpus.validation)} in {self.name}: leave out this length, or hold out more text"
            )

    def loss_slices(self, batch: Batch) -> Mapping[str, LossPartition]:
        config = self.config
        if config.slices is None:
            return {}
        if self._slices is None:
            self._slices = Slices(config.slices, self.corpus.train[:COUNTED_TOKENS], config.sequence_length)
        return self._slices.of(batch, (batch.inputs == self.begin).cumsum(1).numpy() if config.packing else None)

    def packed(self, batch: Batch) -> Packed:
        if not self.config.packing:
            return super().packed(batch)
        return pack(batch, self.most_documents(batch.inputs.shape[1]), self.begin)

    def _check_documents(self, batch: Batch) -> Batch:
        """Return the batch, if packing finds at most `most_documents` in every sequence.

        Raises:
            SeqmixError: a sequence has more documents, because the begin token also occurs inside documents.
        """
        if self.config.packing:
            most = self.most_documents(batch.inputs.shape[1])
            if (count := 1 + int((batch.inputs[:, 1:] == self.begin).sum(1).max())) > most:
                raise SeqmixError(
                    f"{self.name} has the begin token {self.begin} inside its documents: data.packing expected at most "
                    f"{most} documents in a sequence, got {count}; tokenize the text again without it or with another "
                    "data.begin_token, or set data.packing=false"
                )
        return batch

    def most_documents(self, length: int) -> int:
        """Return the maximum number of documents in a sequence of this length (cached)."""
        if length not in self._most_documents:
            streams = (self.corpus.train, self.corpus.validation)
            bounds = [most_documents(tokens, length, self.begin) for tokens in streams]
            if any(isinstance(source, Streamed) for source in self._sources):
                bounds.append(1 + length // 2)  # the shortest document is a begin token and one token
            self._most_documents[length] = max(bounds)
        return self._most_documents[length]


def cut(tokens: Tokens, starts: np.ndarray, length: int, begin: int) -> Batch:
    """Cut sequences of `length` tokens at these positions; beyond the stream, padding with ignored targets."""
    return as_batch(windows(tokens, starts, length, len(tokens)), begin)


def as_batch(sequences: np.ndarray, begin: int) -> Batch:
    """Split sequences [B T + 1] into inputs and targets; targets ignore padding and begin tokens."""
    inputs = np.where(sequences == PADDING, 0, sequences)
    targets = np.where((sequences == PADDING) | (sequences == begin), IGNORED, sequences)
    return Batch(torch.from_numpy(inputs[:, :-1].copy()), torch.from_numpy(targets[:, 1:].copy()))
