"""Token files: tokenized documents on disk, memory-mapped.

A token file is a safetensors file. Its tensors:

tokens   uint16 or uint32 [L]   all documents, each after a begin token
ends     int64 [N]              where each document ends
digests  uint64 [N]             the first 8 bytes of the SHA-256 of each document's text, big-endian
checks   uint32 [ceil(L / B)]   CRC-32 of every block of B = 65,536 tokens

Its metadata, as strings:

seqmix.tokens      version of this format, 1
seqmix.tokenizer   `bytes`, or sha256: and the hash of the tokenizer.json
seqmix.begin       the begin token
seqmix.bytes       size of all texts in bytes
seqmix.tables      CRC-32 of ends, digests and checks, concatenated

Ends, digests and checks are read on opening; a block of tokens is verified when it is first read.
"""

import json
from array import array
from collections.abc import Iterable, Mapping
from functools import reduce
from os import fsencode
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
from safetensors import SafetensorError, safe_open

from ..models import Tokenizer
from ..registry import DataError, SeqmixError, replacing_all
from .token_store import TokenDocument, digest

VERSION = "1"
BLOCK = 2**16
"""Tokens per checksum."""
HEADER = 1024
"""Bytes reserved for the header, which is written last."""
TABLES = {"ends": "<i8", "digests": "<u8", "checks": "<u4"}
"""NumPy dtypes of the tables, in their order in the file."""
DTYPES = {"tokens": ("U16", "U32"), "ends": ("I64",), "digests": ("U64",), "checks": ("U32",)}
"""Allowed safetensors dtypes of each tensor."""
METADATA = {"tokens", "tokenizer", "begin", "bytes", "tables"}
"""Required metadata keys, without the prefix `seqmix.`."""
MAX_BYTES = 2**62
"""Upper bound on a plausible size of all texts; metadata with more is damaged."""


class TokenFile:
    """An opened token file: a store of the documents of one file.

    Args:
        path: the file.
        tokenizer: the tokenizer that the file must have been written with.
        name: name of the file relative to the configured folder, for the split `by_file`.

    Raises:
        SeqmixError: the file is missing, truncated, damaged, not a token file, or of another tokenizer.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, name: str = "") -> None:
        self.path = path
        self._tokens, tables, metadata = _open(path)
        if (identity := metadata["tokenizer"]) != tokenizer.identity:
            raise SeqmixError(
                f"{path} was tokenized with {_shorten(identity)}, but data.tokenizer is "
                f"{_shorten(tokenizer.identity)}: set data.tokenizer to that tokenizer, or tokenize the text again"
            )
        self.ends, self.digests, self._checks = tables.values()
        if str(_checksum(*(table.tobytes() for table in tables.values()))) != metadata["tables"]:
            raise DataError(
                f"{path} is damaged: the checksum of its document table does not match; tokenize the text again"
            )
        _require_documents(path, self.ends, self.digests, self._checks, self._tokens.get_shape()[0])
        if metadata["begin"] != str(tokenizer.begin):
            raise SeqmixError(
                f"{path} begins documents with token {metadata['begin']}, but data.tokenizer begins them with token "
                f"{tokenizer.begin}: set data.begin_token as it was when the file was written, or tokenize the text "
                "again"
            )
        self._vocab_size = tokenizer.vocab_size
        self._verified = np.zeros(len(self._checks), dtype=bool)
        self.names = np.full(len(self.ends), digest(fsencode(name)), dtype=np.uint64)
        self.bytes = _parse_size(metadata["bytes"])
        if not len(self.ends) <= self.bytes < MAX_BYTES:
            raise DataError(
                f"{path} is damaged: the size of its {len(self.ends):,} documents is {metadata['bytes']!r} bytes; "
                "tokenize the text again"
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return a copy of the tokens `start` to `stop - 1`; blocks are verified on their first read.

        Raises:
            SeqmixError: a block is damaged.
        """
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            first = block * BLOCK
            last = min((block + 1) * BLOCK, int(self.ends[-1]))
            if not self._verified[block]:
                self._verify_block(block, first, self._tokens[first:last])
            self._verified[block] = True
        return self._tokens[start:stop]

    def name_of(self, number: int) -> str:
        """Return the file, and the number of a document in it, for messages."""
        return f"{self.path}, document {number:,}"

    def _verify_block(self, block: int, first: int, tokens: np.ndarray) -> None:
        """Check a block's checksum, and that its tokens are in the vocabulary.

        The second check is needed because whoever writes a file with invalid tokens can also write a valid checksum.
        """
        if crc32(tokens.tobytes()) != self._checks[block]:
            raise DataError(
                f"{self.path} is damaged from token {first:,} on: the checksum does not match; tokenize the text again"
            )
        if (largest := int(tokens.max())) >= self._vocab_size:
            at = first + int(tokens.argmax())
            raise DataError(
                f"{self.path} is damaged at token {at:,}: expected a token from 0 to {self._vocab_size - 1:,}, got "
                f"{largest:,}; tokenize the text again"
            )


def write_token_file(
    path: Path, documents: Iterable[TokenDocument], tokenizer: Tokenizer, *, vocabulary: Path | None = None
) -> TokenFile:
    """Write documents to a token file as they come; the file appears only when it is complete.

    Args:
        path: the token file.
        documents: the tokenized documents.
        tokenizer: the tokenizer that they were tokenized with.
        vocabulary: a file to write the tokenizer.json to, if any. After an error neither file exists.

    Returns:
        The opened token file.

    Raises:
        SeqmixError: the file cannot be written, or there are no documents.
    """
    try:
        with replacing_all([path] if vocabulary is None else [path, vocabulary]) as (partial, *vocabulary_files):
            for vocabulary_file in vocabulary_files:
                vocabulary_file.write_bytes(tokenizer.vocabulary or b"")
            with partial.open("wb") as file:
                _write_documents(file, documents, tokenizer)
    except OSError as error:
        raise DataError(f"the token file cannot be written to {path}: {error.strerror}") from error
    return TokenFile(path, tokenizer)


def _write_documents(file: BinaryIO, documents: Iterable[TokenDocument], tokenizer: Tokenizer) -> None:
    """Write the tokens and tables of a token file, and then its header."""
    dtype = np.dtype(tokenizer.dtype).newbyteorder("<")
    ends = array("q")
    digests = array("Q")
    checks = array("I")
    size = total = 0
    file.write(bytes(HEADER))
    pending = bytearray()

    def flush(length: int) -> None:
        checks.append(crc32(pending[:length]))
        file.write(pending[:length])
        del pending[:length]

    for document in documents:
        pending += np.array([tokenizer.begin], dtype=dtype).tobytes()
        pending += document.tokens.astype(dtype).tobytes()
        total += len(document.tokens) + 1
        ends.append(total)
        digests.append(document.digest)
        size += document.size
        while len(pending) >= BLOCK * dtype.itemsize:
            flush(BLOCK * dtype.itemsize)
    if pending:
        flush(len(pending))
    if not ends:
        raise SeqmixError("there is no text to tokenize: expected at least one document that is not empty, got none")
    columns = zip(TABLES.items(), (ends, digests, checks), strict=True)
    tables = {name: np.array(column, table_dtype) for (name, table_dtype), column in columns}
    data = [table.tobytes() for table in tables.values()]
    file.writelines(data)
    metadata = {"tokens": VERSION, "tokenizer": tokenizer.identity, "begin": tokenizer.begin, "bytes": size}
    lengths = {"tokens": (dtype, total)} | {name: (table.dtype, len(table)) for name, table in tables.items()}
    file.seek(0)
    file.write(_header(lengths, metadata | {"tables": _checksum(*data)}))


def _header(lengths: Mapping[str, tuple[np.dtype, int]], metadata: Mapping[str, object]) -> bytes:
    """Return a safetensors header, padded with spaces to `HEADER` bytes."""
    entries: dict[str, object] = {"__metadata__": {f"seqmix.{key}": str(value) for key, value in metadata.items()}}
    end = 0
    for name, (dtype, length) in lengths.items():
        start = end
        end = end + length * dtype.itemsize
        dtype_name = f"{dtype.kind.upper()}{8 * dtype.itemsize}"
        entries[name] = {"dtype": dtype_name, "shape": [length], "data_offsets": [start, end]}
    return (HEADER - 8).to_bytes(8, "little") + json.dumps(entries).encode().ljust(HEADER - 8)


def _open(path: Path) -> tuple[Any, dict[str, np.ndarray], dict[str, str]]:
    """Open a token file, and return its memory-mapped tokens, its tables and its metadata."""
    try:
        tensors = safe_open(path, "np")  # checks the header and the file's length
    except SafetensorError as error:
        raise DataError(f"{path} is damaged, truncated, or not a token file: {error}") from error
    except OSError as error:
        raise DataError(f"the token file {path} cannot be read: {error.strerror or error}") from error
    metadata = {key.removeprefix("seqmix."): value for key, value in (tensors.metadata() or {}).items()}
    if "tokens" not in metadata:
        raise DataError(f"{path} is not a token file: write one with `seqmix tokenize`")
    if metadata["tokens"] != VERSION:
        raise SeqmixError(
            f"{path} must be a token file of version {VERSION}, got version {metadata['tokens']}: tokenize the text "
            "again"
        )
    if missing := METADATA - metadata.keys() | DTYPES.keys() - set(tensors.keys()):
        raise DataError(f"{path} is damaged: it lacks {min(missing)}; tokenize the text again")
    for name, allowed in DTYPES.items():
        tensor = tensors.get_slice(name)
        dtype = tensor.get_dtype()
        shape = tensor.get_shape()
        if dtype not in allowed or len(shape) != 1 or not shape[0]:
            raise DataError(
                f"{path} is damaged: the tensor {name} must be one-dimensional {' or '.join(allowed)}, got {dtype} "
                f"{shape}; tokenize the text again"
            )
    return tensors.get_slice("tokens"), {name: tensors.get_tensor(name) for name in TABLES}, metadata


def _require_documents(path: Path, ends: np.ndarray, digests: np.ndarray, checks: np.ndarray, length: int) -> None:
    """Check that the tables describe documents that cover all `length` tokens."""
    if int(ends[0]) < 1 or int(ends[-1]) != length or not (ends[1:] > ends[:-1]).all():
        raise DataError(
            f"{path} is damaged: expected the ends of its documents to increase up to {length:,}, its number of "
            "tokens; tokenize the text again"
        )
    for name, table, expected in (("digests", digests, len(ends)), ("checks", checks, -(-length // BLOCK))):
        if len(table) != expected:
            raise DataError(
                f"{path} is damaged: expected {expected:,} {name}, got {len(table):,}; tokenize the text again"
            )


def _parse_size(text: str) -> int:
    """Parse a number of bytes; -1 if the text is not a number."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else -1


def _checksum(*tables: bytes) -> int:
    """Return the CRC-32 of the concatenated tables."""
    return reduce(lambda check, table: crc32(table, check), tables, 0)


def _shorten(identity: str) -> str:
    """Return a tokenizer's identity, shortened for messages."""
    return identity if len(identity) < 24 else f"the tokenizer {identity[:19]}..."
