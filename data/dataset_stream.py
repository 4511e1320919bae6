"""A dataset as an endless stream of tokens, read from start to end again and again, with a position that can be saved.

Rows are shuffled in blocks of `shuffle_buffer`: the order of the documents in a block depends only on seed, pass and
block. A position is therefore small: where the block starts in the dataset (shard and offset, from the state that
`datasets` returns), a document of the block, and a token of the document. Resuming reads that block again, and nothing
before it.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from copy import deepcopy
from itertools import islice
from typing import Any

import numpy as np

from ..models import Tokenizer
from ..registry import DataError
from .corpus_config import DocumentsConfig
from .files import explain_dataset, open_dataset, row_documents, source_name
from .token_store import tokenized

START: Mapping[str, Any] = {"pass": 0, "block": 0, "row": 0, "rows": None, "document": 0, "token": 0}
"""Position of the first token of the stream."""


class DatasetStream:
    """The endless token stream of a streamed dataset, with a begin token before each document.

    Args:
        config: the source; its `dataset` is read.
        tokenizer: tokenizer of the documents.
        seed: seed of the document order.
        place: position to start from: `START`, or the `place` of another stream of the same source and seed.
    """

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
        """Position of the next token, as JSON."""
        document = self._read_ahead[0][0] if self._read_ahead else self._place
        return deepcopy(document) | {"token": self._token}

    def take(self, count: int) -> np.ndarray:
        """Consume the next `count` tokens, and return them with the token that follows, [count + 1].

        Raises:
            SeqmixError: the dataset cannot be read, or has no text.
        """
        available = sum(len(tokens) for _, tokens in self._read_ahead) - self._token
        while available <= count:
            self._read_ahead.append(next(self._documents))
            available += len(self._read_ahead[-1][1])
        tokens = np.concatenate([tokens for _, tokens in self._read_ahead])[self._token :][: count + 1]
        self._token += count
        while self._token >= len(self._read_ahead[0][1]):
            self._token -= len(self._read_ahead.popleft()[1])
        return tokens

    def _read(self, place: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Yield the position and the tokens of each document, endlessly, from a position on."""
        begin = np.array([self.tokenizer.begin], dtype=self.tokenizer.dtype)
        number = place["pass"]
        first = place["document"]
        has_documents = False
        while True:
            for block, documents in self._blocks(place):
                order = np.random.default_rng([self.seed, number, block["block"]]).permutation(len(documents))
                for at in range(first, len(documents)):
                    yield {"pass": number, **block, "document": at}, np.concatenate((begin, documents[order[at]]))
                first = 0
                has_documents = has_documents or bool(documents)
            if not has_documents:
                raise DataError(
                    f"the dataset is empty: no text in {source_name(self.config)}; check its split and data.text_field"
                )
            number = number + 1
            place = START

    def _blocks(self, place: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], list[np.ndarray]]]:
        """Yield the blocks of one pass from a position on.

        Each block comes as its position (its number, its first row, and the dataset's state before that row) and the
        tokens of its documents.
        """
        dataset = self.config.dataset
        assert dataset is not None
        number = place["block"]
        row = place["row"]
        rows_state = place["rows"]
        with explain_dataset(dataset):
            if self._rows is None:
                rows = open_dataset(dataset)
                self._rows = rows if dataset.documents is None else rows.take(dataset.documents)
            self._rows.load_state_dict(deepcopy(rows_state))  # None means the start of the dataset
            remaining = iter(self._rows)
            while block := list(row_documents(self.config, islice(remaining, dataset.shuffle_buffer), row)):
                documents = tokenized((document for document in block if document.text), self.tokenizer)
                yield {"block": number, "row": row, "rows": rows_state}, [document.tokens for document in documents]
                number = number + 1
                row = row + len(block)
                rows_state = deepcopy(self._rows.state_dict())
