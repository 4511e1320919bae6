"""The runs of a study, several at once, each in a process of its own.

What is finished is not made again, what was stopped or killed goes on from its checkpoint. Processes stop with a
checkpoint where the pipe to them ends: when a stop is asked for, and when this process dies. They hold the study's lock
with it, so that no second process begins while one of them still writes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import IO, Any, Protocol

import torch

from ..training.checkpoint import CheckpointError, checkpoints, find
from ..training.logging import METRICS_FILE
from .collect import RUNS, is_finished, is_same
from .plan import Plan, PlannedRun
from .study import StudyError
from .worker import FINISHED, STOPPED

PROGRAM = (sys.executable, "-c", f"from {__package__}.worker import main; main()")
LOCK, LOGS = "study.lock", "logs"
PATIENCE = 60.0
"""Seconds that runs of a study whose process has died are waited for: each makes a step and writes a checkpoint."""


class Shown(Protocol):
    """Who is told how it goes."""

    def note(self, text: str) -> None:
        """Something that whoever started it should know."""

    def started(self, run: PlannedRun) -> None:
        """A run begins, or goes on."""

    def moved(self, run: PlannedRun, told: dict[str, Any]) -> None:
        """A run has made steps."""

    def ended(self, run: PlannedRun, problem: str | None) -> None:
        """A run is finished, or has failed."""


@dataclass
class Outcome:
    """How it went."""

    failed: dict[str, str] = field(default_factory=dict)
    """Why runs failed, by name."""
    stopped: bool = False
    """Whether a stop was asked for before all were made."""


def make_runs(
    plan: Plan, folder: Path, *, jobs: int, shown: Shown, stop: Callable[[], bool] = lambda: False
) -> Outcome:
    """Make the runs that are not finished.

    Args:
        plan: what is made.
        folder: where; the caller holds its lock.
        jobs: runs at once; on GPUs, each has one, in turn.
        shown: told how it goes.
        stop: asked now and then; true lets running ones stop with a checkpoint, and begins no other.
    """
    waiting = [run for run in plan.runs if not is_left_alone(run, folder / RUNS / run.name)]
    outcome, told = Outcome(), Queue[tuple["_Process", dict[str, Any] | None]]()
    slots, running = list(range(jobs)), set["_Process"]()
    gpus = visible_gpus()
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            if not outcome.stopped and (waiting or running) and stop():
                outcome.stopped, waiting = True, []
                for process in running:
                    process.ask_to_stop()
            while waiting and slots:
                run, slot = waiting.pop(0), slots.pop(0)
                _clear(run, folder / RUNS / run.name, shown)
                gpu = gpus[slot % len(gpus)] if gpus else None
                running.add(_Process(run, folder, plan.study.threads, slot, gpu, told))
                shown.started(run)
            try:
                process, message = told.get(timeout=0.2)
            except Empty:
                continue
            if message is not None:
                process.last = message
                shown.moved(process.run, message)
                continue
            running.remove(process)
            slots.insert(0, process.slot)
            problem = process.problem()
            if problem is None or not outcome.stopped:
                shown.ended(process.run, problem)
            if problem is not None and not (outcome.stopped and process.code == STOPPED):
                outcome.failed[process.run.name] = problem
    finally:
        for process in running:  # a second Ctrl-C, or an error of ours
            process.popen.kill()
        for process in running:
            process.popen.wait()
    return outcome


def is_left_alone(run: PlannedRun, folder: Path) -> bool:
    """Whether nothing is to be done for a run."""
    return is_same(run, folder) and is_finished(run, folder)


def default_jobs(threads: int) -> int:
    """A run a GPU; where there is none, a run for as many cores as it has threads."""
    if gpus := visible_gpus():
        return len(gpus)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(index) for index in range(count)]


def _clear(run: PlannedRun, folder: Path, shown: Shown) -> None:
    """Make room for a run, or leave what it can go on from."""
    if not folder.exists():
        return
    if not checkpoints(folder):
        shutil.rmtree(folder)  # it was killed before there was anything to keep
        return
    if (why := _why_anew(run, folder)) is None:
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    folder.rename(aside)
    shown.note(f"{run.name} {why} and is made anew; what was there is now {aside}")


def _why_anew(run: PlannedRun, folder: Path) -> str | None:
    """Why a run that is not finished cannot go on from its checkpoints; None if it can."""
    if not is_same(run, folder):
        return "has another configuration than before"
    try:
        step = find(folder).manifest.step
    except CheckpointError:
        return "has no checkpoint that is intact"
    # nothing is left to train, and nothing would be measured
    return f"lacks measurements in {METRICS_FILE}" if step == run.config.training.steps else None


class _Process:
    """A run that is being made."""

    def __init__(
        self,
        run: PlannedRun,
        folder: Path,
        threads: int,
        slot: int,
        gpu: str | None,
        told: "Queue[tuple[_Process, dict[str, Any] | None]]",
    ) -> None:
        self.run, self.slot = run, slot
        self.log = folder / LOGS / f"{run.name}.txt"
        self.last: dict[str, Any] = {}
        number = str(threads)
        environment = os.environ | {"OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number, "OMP_WAIT_POLICY": "passive"}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                PROGRAM,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is ours to hand on
                pass_fds=_held_locks,
            )
        asked = {
            "config": run.config.model_dump(mode="json"),
            "folder": str(folder / RUNS / run.name),
            "threads": threads,
        }
        assert self.popen.stdin is not None
        with suppress(OSError):  # it has died already, and its log says why
            self.popen.stdin.write(json.dumps(asked) + "\n")
            self.popen.stdin.flush()
        Thread(target=self._listen, args=(told,), daemon=True).start()

    @property
    def code(self) -> int:
        """Its exit status."""
        return self.popen.returncode

    def ask_to_stop(self) -> None:
        """Behind its step, with a checkpoint."""
        if self.popen.stdin is not None:
            with suppress(OSError):
                self.popen.stdin.close()

    def problem(self) -> str | None:
        """Why it is not finished, in one sentence; None if it is."""
        if self.code == FINISHED:
            return None
        if "failed" in self.last:
            return str(self.last["failed"])
        if self.code == STOPPED:
            return "it was stopped by a signal; begin the study again to go on with it"
        if self.code < 0:
            name = signal.Signals(-self.code).name
            hint = ", as where memory runs out" if name == "SIGKILL" else ""
            return f"it was killed by {name}{hint}; begin the study again to go on with it"
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        return f"{last} (exit status {self.code}; {self.log} has more)"

    def _listen(self, told: "Queue[tuple[_Process, dict[str, Any] | None]]") -> None:
        for line in self.popen.stdout or ():
            with suppress(ValueError):
                told.put((self, json.loads(line)))
        self.popen.wait()
        if self.popen.stdout is not None:
            self.popen.stdout.close()
        self.ask_to_stop()
        told.put((self, None))


# ---- the lock

_held_locks: list[int] = []
"""File descriptors that processes inherit: a lock lives as long as one of them."""


@contextmanager
def locked(folder: Path, shown: Shown) -> Iterator[None]:
    """Keep other processes from making the same study.

    Raises:
        StudyError: one does, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except OSError as error:
        raise StudyError(f"a study cannot be written to {folder}: {error.strerror}") from None
    with file:
        _lock(file, folder, shown)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        _held_locks.append(file.fileno())
        try:
            yield
        finally:
            _held_locks.remove(file.fileno())


def _lock(file: IO[str], folder: Path, shown: Shown) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            file.seek(0)
            if (owner := file.read().strip()) and _lives(owner):
                raise StudyError(
                    f"another process (number {owner}) makes the study in {folder}: stop it first, or wait until it "
                    "ends"
                ) from None
            if time.monotonic() - began > PATIENCE:
                raise StudyError(
                    f"runs of an earlier process are still writing to {folder}: wait until they end"
                ) from None
            if time.monotonic() - began < 1:
                shown.note("waiting for runs of an earlier process, which write their checkpoints")
                time.sleep(1)
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return


def _lives(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True
