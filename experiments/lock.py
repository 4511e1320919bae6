"""The lock of a study's folder: one process at a time runs it, and its runs hold the lock as long as they live."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..registry import try_lock
from .study import StudyError

LOCK = "study.lock"
PATIENCE = 60.0
"""Seconds that runs of a study whose process has died are waited for: each makes a step and writes a checkpoint."""

held: list[int] = []
"""File descriptors that processes inherit: a lock lives as long as one of them."""


@contextmanager
def locked(folder: Path, note: Callable[[str], object]) -> Iterator[None]:
    """Keep other processes from running the study of a folder, which is created; `note` is called with why it takes
    long.

    Raises:
        StudyError: one does.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        _lock(file, folder, note)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        held.append(file.fileno())
        try:
            yield
        finally:
            held.remove(file.fileno())


def _lock(file: IO[str], folder: Path, note: Callable[[str], object]) -> None:
    began = time.monotonic()
    while not try_lock(file):
        file.seek(0)
        if (owner := file.read().strip()) and _lives(owner):
            raise StudyError(
                f"another process (number {owner}) makes the study in {folder}: stop it first, or wait until it ends"
            )
        waited = time.monotonic() - began
        if waited > PATIENCE:
            raise StudyError(f"runs of an earlier process are still writing to {folder}: wait until they end")
        if waited < 1:
            note("waiting for runs of an earlier process, which write their checkpoints")
            time.sleep(1)
        time.sleep(0.2)


def _lives(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True
