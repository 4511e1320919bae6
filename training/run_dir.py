"""A run's folder: made by one process, and held by it until it ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..registry import dump
from .config import RunConfig
from .errors import TrainingError

CONFIG_FILE = "config.yaml"


def require_free(run: Path) -> None:
    """Refuse a folder that has something in it, cannot be looked at, or that no weights could be read from."""
    try:
        str(run).encode()
    except UnicodeEncodeError:  # safetensors would write there, and not read
        raise TrainingError(f"a run cannot be written to {str(run)!a}: a path must be UTF-8") from None
    try:
        taken = run.exists() and (not run.is_dir() or any(run.iterdir()))
    except OSError as error:
        raise TrainingError(f"a run cannot be written to {run}: {error.strerror}") from error
    if taken and (run / CONFIG_FILE).exists():
        raise TrainingError(f"{run} already holds a run: go on with --resume {run}, or write elsewhere with --out DIR")
    if taken:
        raise TrainingError(f"{run} exists and is not an empty folder: write elsewhere with --out DIR")


def claim(run: Path, config: RunConfig, comment: str) -> None:
    """Make a run's folder with its configuration, below a comment; of two runs that start at once, one gets it."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        with (run / CONFIG_FILE).open("x") as file:
            file.write(comment + dump(config))
    except FileExistsError as error:
        raise TrainingError(f"{run} already holds a run, begun meanwhile: write elsewhere with --out DIR") from error
    except OSError as error:
        raise TrainingError(f"a run cannot be written to {run}: {error.strerror}") from error


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Keep other processes from going on with the same run; the system lets go of it however this one ends."""
    with (run / CONFIG_FILE).open() as file:
        if not try_lock(file):
            raise TrainingError(f"another process trains {run}: stop it first, or wait until it ends")
        yield


def try_lock(file: IO[str]) -> bool:
    """Lock a file for as long as it is open; false where another process has. Some systems have no locks: true."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return True
