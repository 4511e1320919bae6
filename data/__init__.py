"""Training data: text as documents, tokens and batches, and synthetic tasks."""

from .corpus import Corpus, read_corpus
from .corpus_config import DatasetConfig, DocumentsConfig, WeightedSourceConfig
from .files import read_documents
from .packing import most_documents, pack
from .source import DATA, Batch, DataConfig, Examples, Packed, Source
from .task import Difficulties, Task, TaskConfig
from .tasks.text import TextConfig
from .token_file import TokenFile, write_token_file
from .token_store import Stream, tokenized

__all__ = [
    "DATA",
    "Batch",
    "Corpus",
    "DataConfig",
    "DatasetConfig",
    "Difficulties",
    "DocumentsConfig",
    "Examples",
    "Packed",
    "Source",
    "Stream",
    "Task",
    "TaskConfig",
    "TextConfig",
    "TokenFile",
    "WeightedSourceConfig",
    "most_documents",
    "pack",
    "read_corpus",
    "read_documents",
    "tokenized",
    "write_token_file",
]
