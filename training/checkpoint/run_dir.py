"""The run directory: the main process creates it, and locks it until the run ends."""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from ...registry import SeqmixError, dump, is_vacant, try_lock, write_file
from ..config import RunConfig
from .errors import RunFileError, TrainingError

CONFIG_FILE = "config.yaml"
LOCK_FILE = "run.lock"
SCORES_FILE = "scores.json"


def require_free(run: Path) -> None:
    """Check that a new run can be written to a directory; the lock file of a killed run may be there.

    Raises:
        TrainingError: the directory is in use, or cannot be a run directory.
    """
    try:
        require_vacant(run, {LOCK_FILE})
    except TrainingError:
        if (run / CONFIG_FILE).exists():
            raise TrainingError(
                f"{run} already holds a run: continue it with --resume {run}, or choose another --out DIR"
            ) from None
        raise


def require_vacant(folder: Path, besides: Collection[str] = ()) -> None:
    """Check that a folder is missing or empty, readable, and has a name that safetensors can open.

    Args:
        folder: the folder.
        besides: names of files that may be in the folder.

    Raises:
        TrainingError: a check fails.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:  # safetensors can write to such a path, but not read from it
        raise TrainingError(f"a run cannot be written to {str(folder)!a}: the path must be UTF-8") from None
    try:
        vacant = is_vacant(folder, besides)
    except OSError as error:
        raise RunFileError(f"a run cannot be written to {folder}: {error.strerror}") from error
    if not vacant:
        problem = "already holds a run" if (folder / CONFIG_FILE).exists() else "exists and is not an empty directory"
        raise TrainingError(f"{folder} {problem}: choose another --out DIR")


@contextmanager
def claim_with_rollback(run: Path, config: RunConfig, comment: str) -> Iterator[None]:
    """Claim a run directory, and restore its previous state if the body of the context raises."""
    existed = run.exists()
    claim(run, config, comment)
    try:
        yield
    except BaseException:
        shutil.rmtree(run, ignore_errors=True)
        if existed:
            with suppress(OSError):
                run.mkdir(exist_ok=True)
        raise


def claim(run: Path, config: RunConfig, comment: str) -> None:
    """Create a run directory with its lock file and configuration. Of two concurrent runs, only one succeeds.

    The lock file is written first, and only by training: a directory without it was written by another command.

    Args:
        run: the run directory.
        config: the configuration to write.
        comment: comment lines above the configuration.

    Raises:
        SeqmixError: another run has claimed the directory, or it cannot be written.
    """
    if (run / CONFIG_FILE).exists():
        raise TrainingError(f"{run} already holds a run, which has started meanwhile: choose another --out DIR")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFileError(f"a run cannot be written to {run}: {error.strerror}") from error
    with lock_run(run):
        if (run / CONFIG_FILE).exists():
            raise TrainingError(f"{run} already holds a run, which has started meanwhile: choose another --out DIR")
        try:
            write_file(comment + dump(config), run / CONFIG_FILE)
        except SeqmixError:  # such as on a full disk
            (run / LOCK_FILE).unlink()
            raise


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Context that locks a run against other processes; the system releases the lock however this process ends.

    Both a lock file and the directory are locked, as the file may be removed. config.yaml cannot be the lock file:
    editors replace it by a new file, which is not locked.

    Raises:
        TrainingError: another process has locked the run, or the lock file cannot be written.
    """
    try:
        file = (run / LOCK_FILE).open("a")
    except OSError as error:
        raise RunFileError(f"a run cannot be written to {run}: {error.strerror}") from error
    with file, ExitStack() as stack:
        locks: list[IO[str] | int] = [file]
        with suppress(OSError):  # not every system opens directories
            locks.append(folder := os.open(run, os.O_RDONLY))
            stack.callback(os.close, folder)
        if not all(map(try_lock, locks)):
            raise TrainingError(f"{run} is locked by another training process: stop it first, or wait until it ends")
        yield
