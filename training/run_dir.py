"""The run directory: created by one process, and locked by it until it ends."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from ..registry import dump
from .config import RunConfig
from .errors import TrainingError

CONFIG_FILE, LOCK_FILE, SCORES_FILE = "config.yaml", "run.lock", "scores.json"


def require_free(run: Path) -> None:
    """Refuse a directory that is not empty, cannot be read, or has a name that safetensors cannot open."""
    try:
        str(run).encode()
    except UnicodeEncodeError:  # safetensors could write there, but not read
        raise TrainingError(f"a run cannot be written to {str(run)!a}: the path must be UTF-8") from None
    try:
        taken = run.exists() and (not run.is_dir() or any(run.iterdir()))
    except OSError as error:
        raise TrainingError(f"a run cannot be written to {run}: {error.strerror}") from error
    if taken and (run / CONFIG_FILE).exists():
        raise TrainingError(f"{run} already holds a run: continue it with --resume {run}, or choose another --out DIR")
    if taken:
        raise TrainingError(f"{run} exists and is not an empty directory: choose another one with --out DIR")


@contextmanager
def claimed(run: Path, config: RunConfig, comment: str) -> Iterator[None]:
    """`claim` a run directory for what a block writes there: after an error in it, it is as before."""
    there = run.exists()
    claim(run, config, comment)
    with whole_folder(run, there=there):
        yield


@contextmanager
def whole_folder(folder: Path, *, there: bool) -> Iterator[None]:
    """Delete a folder, or if it was `there` and empty what is in it, after an error in the block."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if there:
            with suppress(OSError):
                folder.mkdir(exist_ok=True)
        raise


def claim(run: Path, config: RunConfig, comment: str) -> None:
    """Create a run directory with its configuration, after a comment; of two concurrent runs, one succeeds."""
    made = False
    try:
        run.mkdir(parents=True, exist_ok=True)
        with (run / CONFIG_FILE).open("x") as file:
            made = True
            file.write(comment + dump(config))
    except FileExistsError as error:
        raise TrainingError(f"{run} already holds a run, started meanwhile: choose another --out DIR") from error
    except OSError as error:
        if made:  # on a full disk: a part of it would stand for a run
            (run / CONFIG_FILE).unlink(missing_ok=True)
        raise TrainingError(f"a run cannot be written to {run}: {error.strerror}") from error


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Lock the run against other processes; the system releases the lock however this one ends.

    The lock is a file of its own, as an editor replaces config.yaml by a new file, which nobody has locked; and the
    directory, as somebody may remove the file.
    """
    if not (run / CONFIG_FILE).is_file():
        raise TrainingError(f"{run} is not a run directory: it has no {CONFIG_FILE}")
    try:
        file = (run / LOCK_FILE).open("a")
    except OSError as error:
        raise TrainingError(f"a run cannot be written to {run}: {error.strerror}") from error
    with file, ExitStack() as stack:
        locks: list[IO[str] | int] = [file]
        with suppress(OSError):  # not every system opens directories
            locks.append(folder := os.open(run, os.O_RDONLY))
            stack.callback(os.close, folder)
        if not all(map(try_lock, locks)):
            raise TrainingError(f"{run} is locked by another training process: stop it first, or wait until it ends")
        yield


def try_lock(file: IO[str] | int) -> bool:
    """Lock a file while it is open; false if another process holds the lock. True on systems without locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return True
