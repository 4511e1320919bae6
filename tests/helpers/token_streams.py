"""Batches cut from a stream of tokens, as a text of them gives them."""

from seqmix.data import Batch, Corpus
from seqmix.data.tasks.text import Text, TextConfig


def text_of(tokens, length: int, **fields) -> Text:
    """A text whose two splits are these tokens."""
    return Text(TextConfig(sequence_length=length, **fields), Corpus("tokens", 1, "tail", tokens, tokens))


def training_batch(tokens, length, batch_size, *, seed, step, rank=0, world_size=1, **fields) -> Batch:
    return text_of(tokens, length, **fields).training_batch(step, batch_size, seed, rank, world_size)


def evaluation_batches(tokens, length, batch_size, limit) -> list[Batch]:
    return [example.batch for example in text_of(tokens, length).evaluation_batches(batch_size, limit)]
