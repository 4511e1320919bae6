"""Documents from Hugging Face `datasets`: on disk, on the hub, or streamed."""

from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

from ..registry import SeqmixError
from .corpus_config import DatasetConfig

SAVED = ("state.json", "dataset_dict.json")
"""What `save_to_disk` leaves in a folder of one split, and of several."""


def rows(config: DatasetConfig) -> Iterator[dict[str, object]]:
    """The rows of a data set, in order.

    Raises:
        SeqmixError: the library is not installed, or the data set cannot be had.
    """
    try:
        datasets = import_module("datasets")
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise SeqmixError("data.dataset needs datasets: pip install 'seqmix[data]'") from None
    try:
        yield from islice(_load(datasets, config), config.documents)
    except SeqmixError:
        raise
    except Exception as error:  # the library lets through whatever its file systems, formats and network raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SeqmixError(f"the data set {config.path} cannot be read: {reason}") from error


def _load(datasets: Any, config: DatasetConfig) -> Any:
    """What `save_to_disk` wrote, or what `load_dataset` finds."""
    folder = Path(config.path).expanduser()
    if not any((folder / file).is_file() for file in SAVED):
        return datasets.load_dataset(config.path, config.name, split=config.split, streaming=config.streaming)
    saved = datasets.load_from_disk(str(folder))
    if not hasattr(saved, "keys"):
        return saved
    if config.split not in saved:
        raise SeqmixError(f"the data set {config.path} has no split {config.split!r}; splits: {', '.join(saved)}")
    return saved[config.split]
