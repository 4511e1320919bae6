"""status.json in the folder of a run or a study: what it is doing, or how it ended, for programs.

It is replaced atomically: at the start, at most once a second while the run trains, and at the end.
"""

import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ...registry import DataError, is_locked, read_bytes, reason_of
from .errors import DivergenceError
from .provenance import seqmix_version
from .run_dir import LOCK_FILE

STATUS_FILE = "status.json"
STUDY_LOCK_FILE = "study.lock"
"""Lock file of a study's folder."""
SECONDS_BETWEEN_WRITES = 1.0
"""Minimum time between two writes while a run trains, in seconds."""

State = Literal["running", "finished", "stopped", "interrupted", "diverged", "failed", "killed"]
"""State of a run or study.

`finished`: all steps are made, or it stopped early. `stopped`: its time budget is spent. `interrupted`: a signal or the
program asked it to stop. `diverged`: NaN or infinity. `failed`: any other error. `killed`: the file says that it is
running, but its process has ended; only `read_status` says this.
"""


@dataclass(frozen=True, kw_only=True)
class Status:
    """Contents of status.json."""

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False)

    state: State
    """State of the run or study."""
    reason: str = ""
    """Why it ended, in one sentence; empty while it is running."""
    step: int
    """Number of steps completed; of a study, number of runs finished."""
    steps: int
    """Number of all steps; of a study, number of all runs."""
    loss: float | None = None
    """Loss of the last step, in nats per token; null for a study, and if it is not finite."""
    validation_loss: float | None = None
    """Validation loss of the last evaluation, in nats per token; null before the first, and for a study."""
    started: str
    """Time of the start or resumption, in UTC."""
    updated: str
    """Time of the last write, in UTC."""
    pid: int | None = None
    """Process ID while it is running, else null."""
    host: str = ""
    """Name of the machine of the process."""
    failed: Mapping[str, str] | None = None
    """Reason of each failed run of a study, by name; null for a run."""
    seqmix: str = ""
    """Version of seqmix."""


class StatusWriter:
    """Writer of the status of one run or study.

    Args:
        folder: the folder of the run or study.
        steps: number of all steps, or runs.
        lists_failures: True for a study, whose status lists its failed runs.
        active: False to write nothing, for processes other than the main one.
    """

    def __init__(self, folder: Path, steps: int, *, lists_failures: bool = False, active: bool = True) -> None:
        self.file = folder / STATUS_FILE
        self.active = active
        self.outcome: tuple[State, str] = "finished", "all steps are made"
        """State and reason that are written if the block of `recording` ends without an error."""
        self._started = False
        self._written = 0.0
        now = _now()
        self.status = Status(
            state="running",
            step=0,
            steps=steps,
            started=now,
            updated=now,
            pid=os.getpid(),
            host=platform.node(),
            failed={} if lists_failures else None,
            seqmix=seqmix_version(),
        )

    def begin(self, step: int) -> None:
        """Write that the run is running, after `step` steps; from now on `recording` writes how it ends."""
        self._started = True
        self.update(at_once=True, step=step)

    def update(self, *, at_once: bool = False, **values: Any) -> None:
        """Change fields of the status, and write it if the last write is long enough ago, or `at_once`."""
        self.status = replace(self.status, **values)
        if self._started and (at_once or time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES):
            self._write()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context that writes how its body ends, if `begin` was called in it."""
        try:
            yield
        except BaseException as error:
            self._end(*_outcome_of(error))
            raise
        self._end(*self.outcome)

    def _end(self, state: State, reason: str) -> None:
        if self._started:
            self.status = replace(self.status, state=state, reason=reason, pid=None)
            self._write()

    def _write(self) -> None:
        if not self.active:
            return
        self._written = time.monotonic()
        self.status = replace(self.status, updated=_now())
        partial = self.file.with_name(f".{self.file.name}.partial")
        # not flushed to disk, as waiting for the disk would slow training; a full disk stops the run at its metrics
        with suppress(OSError):
            partial.unlink(missing_ok=True)
            with partial.open("x", encoding="utf-8") as file:
                file.write(json.dumps(asdict(self.status), indent=2) + "\n")
            partial.replace(self.file)


def read_status(folder: str | Path) -> Status:
    """Read the status of a run or a study; a process that ended without a word gives the state `killed`.

    Args:
        folder: the run directory, or the folder of a study.

    Raises:
        DataError: there is no status, or it is damaged.
    """
    file = Path(folder) / STATUS_FILE
    try:
        status = TypeAdapter(Status).validate_json(read_bytes(file))
    except OSError as error:
        raise DataError(
            f"{folder} has no {STATUS_FILE} that can be read ({error.strerror}): `seqmix train` and `seqmix compare` "
            "write one"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join((*map(str, first["loc"]), first["msg"]))
        raise DataError(f"{file} is damaged: it is not the status of a run or a study ({reason})") from error
    if status.state == "running" and not _is_alive(Path(folder), status):
        unit = "steps" if status.failed is None else "runs"
        reason = f"process {status.pid} ended without a word, after {status.step:,} of {status.steps:,} {unit} or later"
        return replace(status, state="killed", reason=reason, pid=None)
    return status


def _is_alive(folder: Path, status: Status) -> bool:
    """True if the process of a status is running: by its lock; without locks by its ID, which may be another's now."""
    locks = [folder / LOCK_FILE, folder] if status.failed is None else [folder / STUDY_LOCK_FILE]
    are_locked = [is_locked(path) for path in locks]
    if None not in are_locked or any(are_locked):
        return any(are_locked)
    if status.host != platform.node():
        return True  # unknown
    try:
        os.kill(int(status.pid or 0), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return bool(status.pid)


def _outcome_of(error: BaseException) -> tuple[State, str]:
    """Return the state and the reason of a run that an error has ended."""
    match error:
        case DivergenceError():
            return "diverged", reason_of(error)
        case KeyboardInterrupt() | GeneratorExit():
            return "interrupted", "the program ended training between two checkpoints"
        case SystemExit():
            return "failed", f"the program called sys.exit ({reason_of(error)})"
        case _:
            return "failed", reason_of(error)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
