"""A dataset as an endless stream of tokens, read from start to end again and again; its place is a small value.

Rows are shuffled in blocks of `shuffle_buffer`: the documents of a block come in an order that is a function of seed,
pass and block. So a place is where a block starts in the dataset (shard and offset, as `datasets` states them), a
document of the block, and a token of the document; to go on from there, the block is read again, and nothing before it.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import islice
from typing import Any

import numpy as np

from ..models import Tokenizer
from ..registry import SeqmixError
from .corpus_config import DocumentsConfig
from .files import explain_dataset, open_dataset, row_documents, source_name
from .token_store import tokenized

START: Mapping[str, Any] = {"pass": 0, "block": 0, "row": 0, "rows": None, "document": 0, "token": 0}
"""The place of the first token."""


class DatasetStream:
    """The tokens of a streamed dataset, each document after a begin token; from `START`, or the place of another stream
    of the same source and seed."""

    def __init__(
        self, config: DocumentsConfig, tokenizer: Tokenizer, seed: int, place: Mapping[str, Any] = START
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.seed = seed
        self._place = dict(place)
        self._token = place["token"]
        self._rows: Any = None
        self._documents = self._read(deepcopy(self._place))
        self._read_ahead = deque[tuple[dict[str, Any], np.ndarray]]()

    @property
    def place(self) -> dict[str, Any]:
        """Where the next token is."""
        document = self._read_ahead[0][0] if self._read_ahead else self._place
        return deepcopy(document) | {"token": self._token}

    def take(self, count: int) -> np.ndarray:
        """The next tokens, and the one after them, which is not consumed; [count + 1].

        Raises:
            SeqmixError: the dataset cannot be read, or has no text.
        """
        available = sum(len(tokens) for _, tokens in self._read_ahead) - self._token
        while available <= count:
            self._read_ahead.append(next(self._documents))
            available += len(self._read_ahead[-1][1])
        found = np.concatenate([tokens for _, tokens in self._read_ahead])[self._token :][: count + 1]
        self._token += count
        while self._token >= len(self._read_ahead[0][1]):
            self._token -= len(self._read_ahead.popleft()[1])
        return found

    def _read(self, place: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Each document from a place on, with its own place."""
        begin = np.array([self.tokenizer.begin], dtype=self.tokenizer.dtype)
        number = place["pass"]
        first = place["document"]
        some = False
        while True:
            for block, documents in self._blocks(place):
                order = np.random.default_rng([self.seed, number, block["block"]]).permutation(len(documents))
                for at in range(first, len(documents)):
                    yield {"pass": number, **block, "document": at}, np.concatenate((begin, documents[order[at]]))
                first = 0
                some = some or bool(documents)
            if not some:
                raise SeqmixError(f"the dataset is empty: no text in {source_name(self.config)}")
            number = number + 1
            place = START

    def _blocks(self, place: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], list[np.ndarray]]]:
        """The blocks of one pass from a place on: number, first row and where it is in the dataset; and documents."""
        dataset = self.config.dataset
        assert dataset is not None
        number = place["block"]
        row = place["row"]
        where = place["rows"]
        with explain_dataset(dataset):
            if self._rows is None:
                rows = open_dataset(dataset)
                self._rows = rows if dataset.documents is None else rows.take(dataset.documents)
            self._rows.load_state_dict(deepcopy(where))  # None is the start
            remaining = iter(self._rows)
            while block := list(row_documents(self.config, islice(remaining, dataset.shuffle_buffer), row)):
                documents = tokenized((document for document in block if document.text), self.tokenizer)
                yield {"block": number, "row": row, "rows": where}, [document.tokens for document in documents]
                number = number + 1
                row = row + len(block)
                where = deepcopy(self._rows.state_dict())
