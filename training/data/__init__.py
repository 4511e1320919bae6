"""What a run learns: texts, as documents, tokens, and the batches cut from them; and tasks whose answers are known."""

from .base import DATA, Batch, DataConfig, Examples, Packed, Source
from .batches import cut, evaluation_batches, most_documents, pack, training_batch
from .corpus import Corpus, read_corpus
from .sources import read_documents
from .stream import Stream, tokenized
from .token_file import TOKENS, TokenFile, write_token_file

__all__ = [
    "DATA",
    "TOKENS",
    "Batch",
    "Corpus",
    "DataConfig",
    "Examples",
    "Packed",
    "Source",
    "Stream",
    "TokenFile",
    "cut",
    "evaluation_batches",
    "most_documents",
    "pack",
    "read_corpus",
    "read_documents",
    "tokenized",
    "training_batch",
    "write_token_file",
]
