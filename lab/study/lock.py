"""The lock of a study's folder: one process at a time runs the study; its runs keep the lock until they end."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ...registry import try_lock
from ...training.checkpoint.status import STUDY_LOCK_FILE
from .study import StudyError

PATIENCE = 60.0
"""Seconds to wait for runs of a study whose process has died: each finishes its step and writes a checkpoint."""

descriptors: list[int] = []
"""File descriptors of the locks, which the processes of runs inherit: a lock lasts until the last of them is closed."""


@contextmanager
def hold_lock(folder: Path, note: Callable[[str], object]) -> Iterator[None]:
    """Create the folder of a study and lock it against other processes; `note` is called with the reason for a wait.

    Raises:
        StudyError: another process runs the study.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / STUDY_LOCK_FILE).open("a+") as file:
        _lock(file, folder, note)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        descriptors.append(file.fileno())
        try:
            yield
        finally:
            descriptors.remove(file.fileno())


def _lock(file: IO[str], folder: Path, note: Callable[[str], object]) -> None:
    began = time.monotonic()
    while not try_lock(file):
        file.seek(0)
        if (owner := file.read().strip()) and _is_alive(owner):
            raise StudyError(
                f"another process (PID {owner}) is running the study in {folder}: stop it, or wait until it ends"
            )
        waited = time.monotonic() - began
        if waited > PATIENCE:
            raise StudyError(f"runs of an earlier process are still writing to {folder}: wait until they end")
        if waited < 1:
            note("waiting for runs of an earlier process to write their checkpoints")
            time.sleep(1)
        time.sleep(0.2)


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True
