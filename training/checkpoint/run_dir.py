"""The run directory: created by one process, and locked by it until it ends."""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from ...registry import SeqmixError, dump, is_vacant, try_lock, write_file
from ..config import RunConfig
from .errors import TrainingError

CONFIG_FILE = "config.yaml"
LOCK_FILE = "run.lock"
SCORES_FILE = "scores.json"


def require_free(run: Path) -> None:
    """Refuse a directory that a new run cannot have: `require_vacant`, but for the lock of one that was killed."""
    try:
        require_vacant(run, "--out", {LOCK_FILE})
    except TrainingError:
        if (run / CONFIG_FILE).exists():
            raise TrainingError(
                f"{run} already holds a run: continue it with --resume {run}, or choose another --out DIR"
            ) from None
        raise


def require_vacant(folder: Path, option: str, besides: Collection[str] = ()) -> None:
    """Refuse a folder that holds something, cannot be read, or has a name that safetensors cannot open.

    `option` is the command's that names it; `besides` are files that may be there.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:  # safetensors could write there, but not read
        raise TrainingError(f"a run cannot be written to {str(folder)!a}: the path must be UTF-8") from None
    try:
        vacant = is_vacant(folder, besides)
    except OSError as error:
        raise TrainingError(f"a run cannot be written to {folder}: {error.strerror}") from error
    if not vacant:
        what = "already holds a run" if (folder / CONFIG_FILE).exists() else "exists and is not an empty directory"
        raise TrainingError(f"{folder} {what}: choose another {option} DIR")


@contextmanager
def claim_temporarily(run: Path, config: RunConfig, comment: str) -> Iterator[None]:
    """`claim` a run directory for what a block writes there: after an error in it, it is as before."""
    there = run.exists()
    claim(run, config, comment)
    try:
        yield
    except BaseException:
        shutil.rmtree(run, ignore_errors=True)
        if there:
            with suppress(OSError):
                run.mkdir(exist_ok=True)
        raise


def claim(run: Path, config: RunConfig, comment: str) -> None:
    """Create a run directory: its lock, and its configuration after a comment; of two concurrent runs, one succeeds.

    The lock comes first: only training writes one, so that a directory without it and without weights is another's.
    """
    if (run / CONFIG_FILE).exists():
        raise TrainingError(f"{run} already holds a run, started meanwhile: choose another --out DIR")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"a run cannot be written to {run}: {error.strerror}") from error
    with lock_run(run):
        if (run / CONFIG_FILE).exists():
            raise TrainingError(f"{run} already holds a run, started meanwhile: choose another --out DIR")
        try:
            write_file(comment + dump(config), run / CONFIG_FILE)
        except SeqmixError:  # such as on a full disk
            (run / LOCK_FILE).unlink()
            raise


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Lock the run against other processes; the system releases the lock however this one ends.

    The lock is a file of its own, as an editor replaces config.yaml by a new file, which nobody has locked; and the
    directory, as somebody may remove the file.
    """
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
