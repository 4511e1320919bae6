"""Sources of documents: files, datasets, and Python's own standard library."""

import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..registry import DataError, SeqmixError, choices_hint
from .corpus_config import DatasetConfig, DocumentsConfig, SourceConfig, WeightedSourceConfig
from .formats import JSON_LINES, format_of, has_rows, read_lines, read_rows, read_text

TOKENS = ".tokens"
"""Suffix of token files."""
MAX_FILES = 10**6
"""Maximum number of names that a glob may match in a folder; tokenize larger collections in parts first."""
SAVED = "dataset_dict.json", "state.json", "dataset_info.json"
"""Files that show that `save_to_disk` wrote a folder: the first for several splits, the other two for a single one."""
FOREIGN_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
"""Folders of the standard library that hold tests and installed packages."""


class MissingDataError(DataError):
    """A path of `data.paths` does not exist."""


class Document(NamedTuple):
    """A document's text and its origin."""

    file: str
    """File name relative to the configured folder, or the dataset's path."""
    name: str
    """Name in error messages."""
    text: bytes
    """Text of the document, UTF-8 unless `data.encoding` is `bytes`."""


def read_documents(config: DocumentsConfig) -> Iterator[Document]:
    """Read the documents of a configuration lazily and in order, skipping empty ones.

    Raises:
        SeqmixError: a path is missing, unreadable or not text, a JSON line or row has no text, or the dataset cannot be
            loaded.
    """
    return (document for part in config.parts for document in _documents(part) if document.text)


def source_name(config: DocumentsConfig) -> str:
    """Return the name of a source in messages: its paths, or its dataset and split."""
    if len(config.parts) > 1:
        return " + ".join(map(source_name, config.parts))
    (config,) = config.parts
    if config.dataset is not None:
        return f"{config.dataset.path} ({config.dataset.split})"
    return ", ".join(config.paths) if config.paths else "the source of Python's standard library"


def source_files(config: DocumentsConfig) -> Iterator[tuple[str, Path]]:
    """Yield the files of the configured paths, in order, as (name relative to the configured folder, path).

    Raises:
        SeqmixError: a path is missing or unreadable.
    """
    for name in config.paths or ():
        try:
            path = Path(name).expanduser()
            if not path.exists():
                remedy = "to select files in a folder, use data.glob"
                if "*" not in name:
                    remedy = "correct the path" if path.is_absolute() else f"paths are relative to {Path.cwd()}"
                raise MissingDataError(f"data.paths: the corpus {name} does not exist: {remedy}")
            if _is_saved_dataset(path):
                raise SeqmixError(f"{name} is a saved dataset: set data.dataset={{path: {name}}} instead of data.paths")
            if not path.is_file() and not path.is_dir():
                raise DataError(f"the corpus {name} must be a file or a folder, got a pipe, a device or a socket")
            files = [path] if path.is_file() else _matching_files(path, config.glob)
            if not files:
                raise DataError(
                    f"the corpus is empty: no text in {name} (glob {config.glob}); check the path and data.glob"
                )
            for file in files:
                key = file.name if file == path else file.relative_to(path).as_posix()
                if file == path or not any(part.startswith(".") for part in Path(key).parts):
                    yield key, file
        except OSError as error:
            raise DataError(f"the corpus {name} cannot be read: {error.filename}: {error.strerror}") from error
        except RuntimeError as error:
            raise DataError(f"the corpus {name} cannot be found: {error}") from error


def _matching_files(folder: Path, glob: str) -> list[Path]:
    """Return the files of a folder that match a glob, sorted.

    Raises:
        SeqmixError: more than `MAX_FILES` names match.
    """
    paths = list(islice(folder.glob(glob), MAX_FILES + 1))
    if len(paths) > MAX_FILES:
        raise SeqmixError(
            f"the corpus {folder} may have at most {MAX_FILES:,} files that match {glob!r}, got more: narrow data.glob "
            "or tokenize parts of the folder with `seqmix tokenize`"
        )
    return sorted(path for path in paths if path.is_file())


def _documents(config: DocumentsConfig) -> Iterator[Document]:
    if config.dataset is not None:
        with explain_dataset(config.dataset):
            rows = open_dataset(config.dataset)
            if config.dataset.documents is not None:
                rows = islice(rows, config.dataset.documents)
            yield from row_documents(config, rows)
    elif config.paths is None:
        yield from _standard_library()
    for key, path in source_files(config):
        yield from _read_file(key, path, config)


def _read_file(key: str, path: Path, config: DocumentsConfig) -> Iterator[Document]:
    """Read the documents of a file: a single one, or one per line or row."""
    field = config.text_field
    suffix = format_of(path)[0]
    if suffix == TOKENS:
        raise SeqmixError(f"{path} is a token file, whose text is already tokenized: leave it out")
    try:
        if not has_rows(path, field):
            yield Document(key, str(path), read_text(path, config.encoding))
        elif field is None:
            raise SeqmixError(f"{path} is a table: set data.text_field to the column that holds the text, got null")
        else:
            for name, row in _read_lines(path, config.encoding) if suffix == JSON_LINES else read_rows(path, field):
                yield Document(key, name, _text_of(row, field, name, config))
    except OSError as error:
        raise DataError(f"the corpus {path} cannot be read: {error.strerror}") from error


def _read_lines(path: Path, encoding: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the name (`file:line`) and the mapping of each line of a JSON lines file, skipping blank lines."""
    for number, line in enumerate(read_lines(path, encoding), 1):
        if line.strip():
            name = f"{path}:{number}"
            yield name, _parse_line(name, line)


def _parse_line(name: str, line: bytes | str) -> dict[str, object]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # invalid UTF-8 is a ValueError too
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise DataError(f"{name}: the line is not JSON: {reason}") from error
    if not isinstance(value, dict):
        raise DataError(f"{name}: the line must be a mapping, got a {type(value).__name__}")
    return value


def _text_of(row: dict[str, object], field: str, name: str, config: DocumentsConfig) -> bytes:
    """Return the text field of a row, as UTF-8."""
    if field not in row:
        fields = choices_hint(field, row, "fields") if row else "; fields: none"
        if isinstance(config, WeightedSourceConfig):
            setting = "text_field of this entry of data.sources"
        elif isinstance(config, SourceConfig):
            setting = "data.validation.text_field"
        else:
            setting = "data.text_field"
        raise SeqmixError(f"{name}: there is no field {field!r}{fields}; set {setting} to the one with the text")
    text = row[field]
    if not isinstance(text, str):
        raise DataError(f"{name}: the field {field!r} must be text, got {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name}: invalid character at {error.start}: {text[error.start]!r}") from error


def row_documents(config: DocumentsConfig, rows: Iterable[dict[str, object]], first: int = 0) -> Iterator[Document]:
    """Yield one document per row of a dataset, including empty ones.

    Args:
        config: the source; its `dataset` and `text_field` are set.
        rows: the rows.
        first: number of the first row, not counting skipped ones; it appears in the documents' names.
    """
    assert config.dataset is not None
    assert config.text_field is not None
    for number, row in enumerate(rows, config.dataset.skip + first):
        name = f"{source_name(config)}, row {number}"
        yield Document(config.dataset.path, name, _text_of(row, config.text_field, name, config))


@contextmanager
def explain_dataset(config: DatasetConfig) -> Iterator[None]:
    """Context that turns any exception of `datasets` (file system, format, network) into a SeqmixError.

    The error names the dataset.
    """
    try:
        yield
    except SeqmixError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the dataset {config.path} cannot be read: {reason}") from error


def open_dataset(config: DatasetConfig) -> Any:
    """Open a dataset's rows, in order and without the skipped ones; with `streaming`, an `IterableDataset`.

    A folder that `save_to_disk` wrote is loaded from disk; any other path goes to `load_dataset`.

    Raises:
        SeqmixError: the library `datasets` is missing, or the dataset has no such split.
    """
    try:
        datasets = import_module("datasets")
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise SeqmixError("data.dataset needs the package datasets: pip install datasets") from None
    folder = Path(config.path).expanduser()
    if not _is_saved_dataset(folder):
        files = {} if config.data_files is None else {"data_files": list(config.data_files)}
        options = {"split": config.split, "streaming": config.streaming} | files
        rows = datasets.load_dataset(config.path, config.name, **options)
    else:
        rows = datasets.load_from_disk(str(folder))
        if hasattr(rows, "keys"):
            if config.split not in rows:
                splits = choices_hint(config.split, rows, "splits")
                raise SeqmixError(f"the dataset {config.path} has no split {config.split!r}{splits}")
            rows = rows[config.split]
        if config.streaming:
            rows = rows.to_iterable_dataset()
    return rows.skip(config.skip) if config.skip else rows


def _is_saved_dataset(folder: Path) -> bool:
    """True if `save_to_disk` wrote this folder."""
    has_several_splits, *has_one_split = ((folder / file).is_file() for file in SAVED)
    return has_several_splits or all(has_one_split)


def _standard_library() -> Iterator[Document]:
    """Yield Python's own modules, without tests, installed packages and machine-specific files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = list[Path]()
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in FOREIGN_FOLDERS]  # installed packages are many files
        modules = (name for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata"))
        files.extend(Path(folder, name) for name in modules)
    for file in sorted(files):
        yield Document(file.relative_to(root).as_posix(), str(file), file.read_bytes())
