"""What a run learns: documents, their tokens, what is held out of them, and the batches cut from the rest."""

from .batches import Batch, Packed, cut, evaluation_batches, most_documents, pack, training_batch
from .corpus import Corpus, read_corpus, require_vocabulary, tokenizer_of
from .sources import read_documents
from .stream import Stream, tokenized
from .token_file import TOKENS, TokenFile, write_token_file

__all__ = [
    "TOKENS",
    "Batch",
    "Corpus",
    "Packed",
    "Stream",
    "TokenFile",
    "cut",
    "evaluation_batches",
    "most_documents",
    "pack",
    "read_corpus",
    "read_documents",
    "require_vocabulary",
    "tokenized",
    "tokenizer_of",
    "training_batch",
    "write_token_file",
]
