"""File formats: text and JSON lines, compressed or not, Parquet and Arrow. Files that are not text are refused by name.

All are read as streams: in pieces, lines, or batches of rows, so memory holds one document at a time.
"""

import io
import re
from collections.abc import Iterator
from importlib import import_module
from itertools import count, zip_longest
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..registry import SeqmixError
from .corpus_config import BYTES, UTF8

JSON_LINES = ".jsonl"
PARQUET = ".parquet"
ARROW = ".arrow"
"""Suffixes of files whose lines or rows are documents."""
COMPRESSED = {".gz": "gzip", ".xz": "lzma", ".bz2": "bz2", ".zst": "zstd"}
"""Suffixes of compressed text and JSON lines, and the modules that read them."""
PIECE = 2**20
"""Bytes read and checked at a time."""
FEW, ODD = 8, 0.02
"""Bytes of a piece that need not be UTF-8 or printable: so many, or this share."""
LARGE = 2**26
EXPANSION = 500
"""Bytes from which a compressed file may not expand more than so many times; text expands 3 to 20 times."""
CONTROL = bytes({*range(32), 127} - set(b"\b\t\n\v\f\r\x1b"))
"""Control characters that no text has."""
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
"""What files are, by a pattern of their first bytes."""
ACCEPTED = (
    "data takes UTF-8 text and JSON lines (.jsonl), each also as .gz, .xz, .bz2 or .zst, .parquet, .arrow and .tokens; "
    "data.glob selects files of a folder; data.encoding names another encoding, or is bytes to learn any file"
)


def format_of(path: Path) -> tuple[str, str | None]:
    """The suffix of the format, without that of a compression, and the compression's suffix or None."""
    suffix = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), suffix) if suffix in COMPRESSED else (suffix, None)


def has_rows(path: Path, field: str | None) -> bool:
    """Whether a file holds several documents: lines or rows with a text field."""
    suffix, _ = format_of(path)
    return suffix in (PARQUET, ARROW) or (suffix == JSON_LINES and field is not None)


def open_bytes(path: Path) -> BinaryIO:
    """The content of a file, uncompressed as it is read.

    Raises:
        SeqmixError: now or while reading, a compressed file is damaged, truncated, not what its suffix says, expands
            without end, or needs a library that is not installed.
    """
    _, compression = format_of(path)
    return path.open("rb") if compression is None else io.BufferedReader(_Expanded(path, compression), PIECE)


class _Expanded(io.RawIOBase):
    """A compressed file as it expands."""

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
            found = self._content.read(len(buffer))
        except EOFError:
            raise SeqmixError(
                f"{self.path} is truncated: its {self.suffix} data end early, after {self.size:,} bytes of text"
            ) from None
        except Exception as error:  # every library has errors of its own
            raise SeqmixError(
                f"{self.path} is damaged, or not compressed as its suffix {self.suffix} says: {error}"
            ) from error
        self.size += len(found)
        if self.size > LARGE and self.size > EXPANSION * self._file.tell():
            raise SeqmixError(
                f"{self.path} expands more than {EXPANSION} times, to {self.size:,} bytes and on, and is not read "
                "further: uncompress it if it is text"
            )
        buffer[: len(found)] = found
        return len(found)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def read_text(path: Path, encoding: str) -> bytes:
    """A text file, as UTF-8; with the encoding `bytes`, as it is.

    Raises:
        SeqmixError: it is not text, or not of this encoding.
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
        raise _not_of(path, encoding, error) from error


def read_lines(path: Path, encoding: str) -> Iterator[bytes | str]:
    """The lines of a text file; raises like `read_text`."""
    with open_bytes(path) as file:
        try:
            yield from file if encoding in (UTF8, BYTES) else io.TextIOWrapper(file, encoding, newline="\n")
        except UnicodeError as error:
            raise _not_of(path, encoding, error) from error


def _not_of(path: Path, encoding: str, error: UnicodeError) -> SeqmixError:
    return SeqmixError(f"{path} is not {encoding}, as data.encoding says: {error}")


def _require_text(path: Path, piece: bytes, start: int) -> None:
    """Refuse a piece of a file that is not text; a few odd bytes stay as they are."""
    head = piece[:512] if start == 0 else b""
    what = next((name for name, pattern in SIGNATURES.items() if re.match(pattern, head, re.DOTALL)), None)
    kept = piece.decode(errors="ignore").encode().translate(None, CONTROL)
    odd = len(piece) - len(kept)
    if what is None and odd <= max(FEW, ODD * len(piece)):
        return
    first = 0 if what else next(at for at, (a, b) in enumerate(zip_longest(piece, kept)) if a != b)
    found = f"its first bytes are those of {what}" if what else f"byte 0x{piece[first]:02x}"
    raise SeqmixError(f"{path} is not UTF-8 text at offset {start + first:,} ({found}): {ACCEPTED}")


def read_rows(path: Path, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a Parquet or Arrow file, by name: the field alone, or the names of all columns if there is none.

    Raises:
        SeqmixError: it is damaged, or needs a library that is not installed.
    """
    suffix, compression = format_of(path)
    if compression is not None:
        raise SeqmixError(f"{path}: {suffix} files are compressed inside, and are not read from {compression}")
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
        raise SeqmixError(f"{path} needs pyarrow: pip install 'seqmix[data]'") from None
    except OSError as error:
        raise SeqmixError(f"the corpus {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, NotImplementedError) as error:  # pyarrow's own are among them
        raise SeqmixError(f"{path} is damaged, truncated, or not {suffix}: {str(error).splitlines()[0]}") from error


def _parquet(path: Path, field: str) -> Iterator[Any]:
    file = import_module("pyarrow.parquet").ParquetFile(path)
    names = file.schema_arrow.names
    yield from file.iter_batches(256, columns=[field] if field in names else names)


def _arrow(path: Path) -> Iterator[Any]:
    """Batches of the file format, or of the stream format that `datasets` writes."""
    arrow = import_module("pyarrow")
    with arrow.memory_map(str(path)) as source:
        indexed = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = arrow.ipc.open_file(source) if indexed else arrow.ipc.open_stream(source)
        yield from (map(reader.get_batch, range(reader.num_record_batches)) if indexed else reader)


def _zstd(path: Path) -> Any:
    """Python's own module from 3.14 on, or its backport."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    raise SeqmixError(f"{path} needs Zstandard: pip install 'seqmix[data]'")
