"""File formats: text and JSON lines (plain or compressed), Parquet and Arrow.

All are read as streams, in pieces, lines or batches of rows, so memory holds one document at a time. A file that is not
text raises an error that names its format.
"""

import io
import re
from collections.abc import Iterator
from importlib import import_module
from itertools import count, zip_longest
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..registry import DataError, SeqmixError
from .corpus_config import BYTES, UTF8

JSON_LINES = ".jsonl"
PARQUET = ".parquet"
ARROW = ".arrow"
"""Suffix of an Arrow file. Each line or row of a .jsonl, .parquet or .arrow file is a document."""
COMPRESSED = {".gz": "gzip", ".xz": "lzma", ".bz2": "bz2", ".zst": "zstd"}
"""Suffixes of compressed text and JSON lines, and the modules that read them."""
PIECE = 2**20
"""Bytes read and checked at a time."""
MAX_ODD_BYTES = 8
"""Number of bytes that may be invalid UTF-8 or control characters even in a short piece."""
MAX_ODD_SHARE = 0.02
"""Largest share of a piece's bytes that may be invalid UTF-8 or control characters."""
EXPANSION_LIMIT_FROM = 2**26
"""Size in uncompressed bytes above which `MAX_EXPANSION` is enforced."""
MAX_EXPANSION = 500
"""Maximum ratio of uncompressed to compressed bytes, against archives that never end; text expands 3 to 20 times."""
CONTROL = bytes({*range(32), 127} - set(b"\b\t\n\v\f\r\x1b"))
"""Control characters that do not occur in text."""
SIGNATURES = {
    "gzip (.gz)": rb"\x1f\x8b\x08",
    "xz (.xz)": rb"\xfd7zXZ\0",
    "bzip2 (.bz2)": rb"BZh[1-9]1AY&SY",
    "Zstandard (.zst)": rb"\x28\xb5\x2f\xfd",
    "Parquet (.parquet)": rb"PAR1[\0-\x1f]",
    "Arrow (.arrow)": rb"ARROW1\0|\xff{4}.{2}\0\0",
    "a zip archive": rb"PK\x03\x04",
    "a tar archive": rb".{257}ustar",
    "LZ4": rb"\x04\x22\x4d\x18",
    "7z": rb"7z\xbc\xaf\x27\x1c",
    "PDF": rb"%PDF-",
    "UTF-16 or UTF-32": rb"\xff\xfe|\xfe\xff|\0\0\xfe\xff",
}
"""Names of formats that are not text, with patterns of their first bytes."""
ACCEPTED = (
    "data reads UTF-8 text and JSON lines (.jsonl), each also as .gz, .xz, .bz2 or .zst, .parquet, .arrow and .tokens; "
    "select the files of a folder with data.glob, set data.encoding for another encoding, or set it to bytes to read "
    "any file"
)


def format_of(path: Path) -> tuple[str, str | None]:
    """Return the suffix of a file's format, and the suffix of its compression or None."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in COMPRESSED else (suffix, None)


def has_rows(path: Path, field: str | None) -> bool:
    """True if each line or row of a file is a document; `field` is its text field, None for plain text."""
    suffix, _ = format_of(path)
    return suffix in (PARQUET, ARROW) or (suffix == JSON_LINES and field is not None)


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading; a compressed one is decompressed while it is read.

    Raises:
        SeqmixError: on opening or reading: a compressed file is damaged, truncated, not in the format of its suffix,
            expands more than `MAX_EXPANSION` times, or needs a library that is not installed.
    """
    _, compression = format_of(path)
    return path.open("rb") if compression is None else io.BufferedReader(_Decompressed(path, compression), PIECE)


class _Decompressed(io.RawIOBase):
    """The decompressed content of a compressed file, as a stream."""

    def __init__(self, path: Path, suffix: str) -> None:
        self.path = path
        self.suffix = suffix
        self.size = 0
        module = _zstd(path) if suffix == ".zst" else import_module(COMPRESSED[suffix])
        self._file = path.open("rb")
        self._content = cast(BinaryIO, module.open(self._file))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._content.read(len(buffer))
        except EOFError:
            raise DataError(
                f"{self.path} is truncated: its {self.suffix} data end early, after {self.size:,} bytes of text"
            ) from None
        except Exception as error:  # every library raises its own types
            raise DataError(f"{self.path} is damaged, or is not a {self.suffix} file: {error}") from error
        self.size += len(content)
        if self.size > EXPANSION_LIMIT_FROM and self.size > MAX_EXPANSION * self._file.tell():
            raise SeqmixError(
                f"{self.path} expands more than {MAX_EXPANSION} times, to {self.size:,} bytes or more: if it is text, "
                "decompress it first"
            )
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def read_text(path: Path, encoding: str) -> bytes:
    """Read a text file as UTF-8; with the encoding `bytes`, unchanged.

    Raises:
        SeqmixError: the file is not text, or not in this encoding.
    """
    pieces = []
    size = 0
    with open_bytes(path) as file:
        while piece := file.read(PIECE):
            if encoding == UTF8:
                _require_text(path, piece, size)
            pieces.append(piece)
            size += len(piece)
    text = b"".join(pieces)
    try:
        return text if encoding in (UTF8, BYTES) else text.decode(encoding).encode()
    except UnicodeError as error:
        raise _encoding_error(path, encoding, error) from error


def read_lines(path: Path, encoding: str) -> Iterator[bytes | str]:
    """Yield the lines of a text file.

    Raises:
        SeqmixError: the file is not in this encoding.
    """
    with open_bytes(path) as file:
        try:
            yield from file if encoding in (UTF8, BYTES) else io.TextIOWrapper(file, encoding, newline="\n")
        except UnicodeError as error:
            raise _encoding_error(path, encoding, error) from error


def _encoding_error(path: Path, encoding: str, error: UnicodeError) -> SeqmixError:
    return SeqmixError(
        f"{path} cannot be decoded as {encoding}, the value of data.encoding: {error}; set data.encoding to the "
        "encoding of the file"
    )


def _require_text(path: Path, piece: bytes, start: int) -> None:
    """Check that a piece of a file is text, tolerating a few odd bytes; `start` is its offset in the file."""
    head = piece[:512] if start == 0 else b""
    format_name = next((name for name, pattern in SIGNATURES.items() if re.match(pattern, head, re.DOTALL)), None)
    decoded = piece.decode(errors="ignore").encode()
    text = decoded.translate(None, CONTROL)
    tolerated = max(MAX_ODD_BYTES, MAX_ODD_SHARE * len(piece))
    if format_name is None and len(piece) - len(text) <= tolerated:
        return
    problem = "is not UTF-8 text"
    hint = ""
    if format_name is not None:
        first = 0
        reason = f"its first bytes are those of {format_name}"
    else:
        first = next(offset for offset, (a, b) in enumerate(zip_longest(piece, text)) if a != b)
        reason = f"byte 0x{piece[first]:02x}"
        if len(piece) - len(decoded) <= tolerated:
            problem = "has NUL bytes" if piece[first] == 0 else "has control characters"
            hint = ", like a binary file or text in UTF-16; remove them if it is text"
    raise DataError(f"{path} {problem} at offset {start + first:,} ({reason}){hint}: {ACCEPTED}")


def read_rows(path: Path, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the text field of each row of a Parquet or Arrow file.

    If there is no such column, yield a single row with the names of all columns.

    Raises:
        SeqmixError: the file is damaged, or needs a library that is not installed.
    """
    suffix, compression = format_of(path)
    if compression is not None:
        raise SeqmixError(
            f"{path}: a {suffix} file must not be compressed again (it is compressed internally): decompress the "
            f"{compression} file first"
        )
    number = count()
    try:
        batches = _parquet(path, field) if suffix == PARQUET else _arrow(path)
        for batch in batches:
            names = batch.schema.names
            if field not in names:
                yield f"{path}, row 0", dict.fromkeys(names)
                return
            for value in batch.column(names.index(field)).to_pylist():
                yield f"{path}, row {next(number)}", {field: value}
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("pyarrow"):
            raise
        raise SeqmixError(f"{path} needs pyarrow: pip install pyarrow") from None
    except OSError as error:
        raise DataError(f"the corpus {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, NotImplementedError) as error:  # the base classes of pyarrow's errors
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is damaged, truncated, or not a {suffix} file: {reason}") from error


def _parquet(path: Path, field: str) -> Iterator[Any]:
    file = import_module("pyarrow.parquet").ParquetFile(path)
    names = file.schema_arrow.names
    yield from file.iter_batches(256, columns=[field] if field in names else names)


def _arrow(path: Path) -> Iterator[Any]:
    """Yield the batches of a file in Arrow's file format, or in its stream format, which `datasets` writes."""
    arrow = import_module("pyarrow")
    with arrow.memory_map(str(path)) as source:
        is_file_format = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = arrow.ipc.open_file(source) if is_file_format else arrow.ipc.open_stream(source)
        yield from (map(reader.get_batch, range(reader.num_record_batches)) if is_file_format else reader)


def _zstd(path: Path) -> Any:
    """Import Zstandard: Python's own module from 3.14 on, or its backport."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    raise SeqmixError(f"{path} needs Zstandard: pip install backports.zstd")
