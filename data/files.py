"""Sources of documents: files, datasets, and Python's own standard library."""

import json
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..registry import SeqmixError, nearest
from .corpus_config import DatasetConfig, DocumentsConfig, SourceConfig, WeightedSourceConfig
from .formats import JSON_LINES, format_of, has_rows, read_lines, read_rows, read_text

TOKENS = ".tokens"
"""Suffix of token files."""
MOST_FILES = 10**6
"""Names that a folder and a glob may match: of millions of files, token files are made first."""
SAVED = "dataset_dict.json", "state.json", "dataset_info.json"
"""What `save_to_disk` writes into a folder: the first for several splits, the others for one."""


class Document(NamedTuple):
    """A text and its origin."""

    file: str
    """File name relative to the configured folder, or the dataset's path."""
    name: str
    """Name in error messages."""
    text: bytes


def read_documents(config: DocumentsConfig) -> Iterator[Document]:
    """The documents of a configuration, in order, read lazily; empty ones are left out.

    Raises:
        SeqmixError: a path is missing, unreadable or not text, a JSON line or row has no text, or the dataset cannot be
            loaded.
    """
    return (document for part in config.parts for document in _documents(part) if document.text)


def source_name(config: DocumentsConfig) -> str:
    """The name of the text."""
    if len(config.parts) > 1:
        return " + ".join(map(source_name, config.parts))
    (config,) = config.parts
    if config.dataset is not None:
        return f"{config.dataset.path} ({config.dataset.split})"
    return ", ".join(config.paths) if config.paths else "the source of Python's standard library"


def source_files(config: DocumentsConfig) -> Iterator[tuple[str, Path]]:
    """The files of the configured paths, in order, as (name relative to the configured folder, path).

    Raises:
        SeqmixError: a path is missing or unreadable.
    """
    for given in config.paths or ():
        try:
            path = Path(given).expanduser()
            if not path.exists():
                hint = "; data.glob selects files in a folder" if "*" in given else ""
                raise SeqmixError(f"the corpus {given} does not exist{hint}")
            if _is_saved(path):
                raise SeqmixError(
                    f"{given} is a saved dataset: data.dataset={{path: {given}}} reads it, not data.paths"
                )
            if not path.is_file() and not path.is_dir():
                raise SeqmixError(f"the corpus {given} is a pipe, a device or a socket, not a file or a folder")
            files = [path] if path.is_file() else _matching(path, config.glob)
            if not files:
                raise SeqmixError(f"the corpus is empty: no text in {given} (glob {config.glob})")
            for file in files:
                key = file.name if file == path else file.relative_to(path).as_posix()
                if file == path or not any(part.startswith(".") for part in Path(key).parts):
                    yield key, file
        except OSError as error:
            raise SeqmixError(f"the corpus {given} cannot be read: {error.filename}: {error.strerror}") from error
        except RuntimeError as error:
            raise SeqmixError(f"the corpus {given} cannot be found: {error}") from error


def _matching(folder: Path, glob: str) -> list[Path]:
    """The files of a folder that match, in order; SeqmixError: more than `MOST_FILES` names do."""
    found = list(islice(folder.glob(glob), MOST_FILES + 1))
    if len(found) > MOST_FILES:
        raise SeqmixError(
            f"the corpus {folder} has more than {MOST_FILES:,} files that match {glob!r}: choose some with "
            "data.glob, or `seqmix tokenize` parts of it"
        )
    return sorted(path for path in found if path.is_file())


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
        yield from _read(key, path, config)


def _read(key: str, path: Path, config: DocumentsConfig) -> Iterator[Document]:
    """The documents of a file: one, or one per line or row."""
    field = config.text_field
    suffix = format_of(path)[0]
    if suffix == TOKENS:
        raise SeqmixError(f"{path} is a token file: it holds tokens, and no text")
    try:
        if not has_rows(path, field):
            yield Document(key, str(path), read_text(path, config.encoding))
        elif field is None:
            raise SeqmixError(f"{path} has columns, and data.text_field, which names that of the text, is null")
        else:
            for name, row in _lines(path, config.encoding) if suffix == JSON_LINES else read_rows(path, field):
                yield Document(key, name, _text(row, field, name, config))
    except OSError as error:
        raise SeqmixError(f"the corpus {path} cannot be read: {error.strerror}") from error


def _lines(path: Path, encoding: str) -> Iterator[tuple[str, dict[str, object]]]:
    for number, line in enumerate(read_lines(path, encoding), 1):
        if line.strip():
            name = f"{path}:{number}"
            yield name, _mapping(name, line)


def _mapping(name: str, line: bytes | str) -> dict[str, object]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # invalid UTF-8 is a ValueError too
        what = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise SeqmixError(f"{name}: the line is not JSON: {what}") from error
    if not isinstance(value, dict):
        raise SeqmixError(f"{name}: the line must be a mapping, and is a {type(value).__name__}")
    return value


def _text(row: dict[str, object], field: str, name: str, config: DocumentsConfig) -> bytes:
    if field not in row:
        fields = ", ".join(row) or "none"
        source = isinstance(config, WeightedSourceConfig)
        validation = isinstance(config, SourceConfig)
        setting = "text_field of this one of data.sources" if source else "data.validation.text_field"
        setting = setting if source or validation else "data.text_field"
        raise SeqmixError(
            f"{name}: there is no field {field!r}; fields: {fields}{nearest(field, row)}; {setting} names it"
        )
    text = row[field]
    if not isinstance(text, str):
        raise SeqmixError(f"{name}: the field {field!r} must be text, and is a {type(text).__name__}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise SeqmixError(f"{name}: invalid character at {error.start}: {text[error.start]!r}") from error


def row_documents(config: DocumentsConfig, rows: Iterable[dict[str, object]], first: int = 0) -> Iterator[Document]:
    """The documents of rows of a dataset, numbered from `first`; empty ones too."""
    assert config.dataset is not None
    assert config.text_field is not None
    for number, row in enumerate(rows, config.dataset.skip + first):
        name = f"{source_name(config)}, row {number}"
        yield Document(config.dataset.path, name, _text(row, config.text_field, name, config))


@contextmanager
def explain_dataset(config: DatasetConfig) -> Iterator[None]:
    """Turn whatever the file systems, formats and network of `datasets` raise into a SeqmixError."""
    try:
        yield
    except SeqmixError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SeqmixError(f"the dataset {config.path} cannot be read: {reason}") from error


def open_dataset(config: DatasetConfig) -> Any:
    """The rows of a dataset without those to skip, in order: with `streaming` an `IterableDataset`.

    It is a folder of `save_to_disk`, or what `load_dataset` finds. Raises SeqmixError if the library is missing.
    """
    try:
        datasets = import_module("datasets")
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise SeqmixError("data.dataset needs datasets: pip install 'seqmix[data]'") from None
    folder = Path(config.path).expanduser()
    if not _is_saved(folder):
        files = {} if config.data_files is None else {"data_files": list(config.data_files)}
        options = {"split": config.split, "streaming": config.streaming} | files
        rows = datasets.load_dataset(config.path, config.name, **options)
    else:
        rows = datasets.load_from_disk(str(folder))
        if hasattr(rows, "keys"):
            if config.split not in rows:
                splits = f"{', '.join(rows)}{nearest(config.split, rows)}"
                raise SeqmixError(f"the dataset {config.path} has no split {config.split!r}; splits: {splits}")
            rows = rows[config.split]
        if config.streaming:
            rows = rows.to_iterable_dataset()
    return rows.skip(config.skip) if config.skip else rows


def _is_saved(folder: Path) -> bool:
    splits, *one = ((folder / file).is_file() for file in SAVED)
    return splits or all(one)


def _standard_library() -> Iterator[Document]:
    """Python's own modules, without tests, installed packages and machine-specific files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        foreign = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}.intersection(parts)
        if not foreign and not file.name.startswith("_sysconfigdata"):
            yield Document("/".join(parts), str(file), file.read_bytes())
