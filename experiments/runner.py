"""The runs of a study, several at once, each in a process of its own; and the whole, from its runs to its report.

Finished runs are skipped, stopped or killed ones resume from their checkpoint. Processes stop with a checkpoint where
the pipe to them ends: when a stop is asked for, and when this process dies. They hold the study's lock with it, so that
no second process begins while one of them still writes.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

import torch

from ..training.checkpoint.files import CheckpointError, checkpoints, find
from ..training.interrupt import StopRequest
from ..training.monitoring.logging import METRICS_FILE
from . import lock, results, speed
from .collect import JOBS_FILE, RUNS, collect, is_finished, is_same
from .figures.libraries import PlotsMissingError
from .plan import Plan, PlannedRun
from .report import REPORT_FILE, write_report
from .results import Results, SpeedResult
from .study import StudyError
from .tables import write_tables
from .worker import FINISHED, STOPPED

PROGRAM = (sys.executable, "-P", "-c", f"from {__package__}.worker import main; main()")
LOGS = "logs"
Message = dict[str, Any]
"""What a run says of itself: a step and its loss, an evaluation, or why it failed."""


class Observer:
    """Follows a study, and says in lines how it goes."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self.note = tell
        """Called with what whoever started the study should know."""

    def begin(self, runs: Sequence[PlannedRun], total: int) -> None:
        """These runs, of so many, are not finished."""
        if finished := total - len(runs):
            self.note(f"{finished} of {total} runs are finished already")

    def started(self, run: PlannedRun) -> None:
        """A run begins, or resumes."""
        self.note(f"{run.name} begins")

    def moved(self, run: PlannedRun, message: Message) -> None:
        """A run has made steps."""

    def ended(self, run: PlannedRun, problem: str | None) -> None:
        """A run is finished, or has failed."""
        self.note(f"{run.name} is finished" if problem is None else f"{run.name} failed: {problem}")

    def timing(self, what: str) -> None:
        """The runs are over, and this is timed."""


@dataclass
class StudyOutcome:
    """How it went."""

    failed: dict[str, str] = field(default_factory=dict)
    """Why runs failed, by name."""
    stopped: bool = False
    """Whether a stop was asked for before all runs were finished."""


def run_study(plan: Plan, folder: Path, *, jobs: int | None, observer: Observer) -> tuple[Results, StudyOutcome]:
    """Run a study, or resume it, and write its results, tables and report.

    The first Ctrl-C (or SIGTERM) stops the runs, each with a checkpoint. At once run `jobs`, by default `default_jobs`.

    Raises:
        StudyError: another process runs it, or the folder cannot be written.
    """
    try:
        with lock.locked(folder, observer.note):
            jobs = jobs or default_jobs(plan.study.threads)
            with StopRequest() as stop:
                outcome = make_runs(plan, folder, jobs=jobs, observer=observer, stop=stop.made)
            found = _write(plan, folder, outcome.failed)
            if not outcome.stopped and (timed := speed.measure(plan, folder, observer.timing)):
                found = _write(plan, folder, outcome.failed, timed)
            return found, outcome
    except OSError as error:
        raise StudyError(f"a study cannot be written to {folder}: {error.strerror or error}") from error


def _write(plan: Plan, folder: Path, failed: Mapping[str, str], timed: SpeedResult | None = None) -> Results:
    found = collect(plan, folder, failed=failed, speed=timed)
    results.write(found, folder)
    write_tables(found, folder)
    try:
        write_report(found, folder)
    except PlotsMissingError:
        (folder / REPORT_FILE).unlink(missing_ok=True)  # one of other results
    return found


def make_runs(
    plan: Plan, folder: Path, *, jobs: int, observer: Observer, stop: Callable[[], bool] = lambda: False
) -> StudyOutcome:
    """Train the runs that are not finished; the caller holds the folder's lock.

    At once run `jobs`; each has one of the GPUs, if there are any. `stop` is asked now and then; true lets running ones
    stop with a checkpoint, and begins no other.
    """
    waiting = [run for run in plan.runs if not is_finished(run, folder / RUNS / run.name)]
    observer.begin(waiting, len(plan.runs))
    outcome = StudyOutcome()
    messages = Queue[tuple["_Process", Message | None]]()
    at_once = min(jobs, len(waiting))
    slots = list(range(jobs))
    running = set["_Process"]()
    gpus = visible_gpus()
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            if not outcome.stopped and stop():
                outcome.stopped = True
                waiting = []
                for process in running:
                    process.ask_to_stop()
            while waiting and slots:
                run = waiting.pop(0)
                slot = slots.pop(0)
                _clear(run, folder / RUNS / run.name, observer)
                gpu = gpus[slot % len(gpus)] if gpus else None
                with (folder / JOBS_FILE).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"run": run.name, "at_once": at_once}) + "\n")
                running.add(_Process(run, folder, plan, slot, gpu, messages))
                observer.started(run)
            try:
                process, message = messages.get(timeout=0.2)
            except Empty:
                continue
            if message is not None:
                process.last = message
                observer.moved(process.run, message)
                continue
            running.remove(process)
            slots.insert(0, process.slot)
            problem = process.problem()
            if problem is None or not outcome.stopped:
                observer.ended(process.run, problem)
            if problem is not None and not (outcome.stopped and process.code == STOPPED):
                outcome.failed[process.run.name] = problem
    finally:
        for process in running:  # a second Ctrl-C, or an error in this process
            process.popen.kill()
        for process in running:
            process.popen.wait()
    return outcome


def default_jobs(threads: int) -> int:
    """A run per GPU; without one, a run for as many cores as it has threads."""
    if gpus := visible_gpus():
        return len(gpus)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:count] if given else [str(index) for index in range(count)]


def _clear(run: PlannedRun, folder: Path, observer: Observer) -> None:
    """Make room for a run, or leave what it can resume from."""
    if folder.exists() and not checkpoints(folder):
        shutil.rmtree(folder)  # it was killed before there was anything to save
    elif folder.exists() and (why := _why_again(run, folder)):
        places = (folder.with_name(f"{folder.name}.before-{number}") for number in count(1))
        aside = folder.rename(next(place for place in places if not place.exists()))
        observer.note(f"{run.name} {why} and is trained again; what was there is now {aside}")


def _why_again(run: PlannedRun, folder: Path) -> str | None:
    """Why a run that is not finished cannot resume from its checkpoints; None if it can."""
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
        plan: Plan,
        slot: int,
        gpu: str | None,
        messages: "Queue[tuple[_Process, Message | None]]",
    ) -> None:
        self.run = run
        self.slot = slot
        self.messages = messages
        self.folder = folder / RUNS / run.name
        self.log = folder / LOGS / f"{run.name}.txt"
        self.last: Message = {}
        threads = plan.study.threads
        # the runs of a study are one group in W&B, unless it is called otherwise
        environment = {"WANDB_RUN_GROUP": plan.name} | os.environ
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        environment |= {"OMP_WAIT_POLICY": "passive"} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                PROGRAM,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is ours to hand on
                pass_fds=lock.held,
            )
        asked = {"config": run.config.model_dump(mode="json"), "folder": str(self.folder), "threads": threads}
        assert self.popen.stdin is not None
        with suppress(OSError):  # it has died already, and its log says why
            self.popen.stdin.write(json.dumps(asked) + "\n")
            self.popen.stdin.flush()
        Thread(target=self._listen, daemon=True).start()

    @property
    def code(self) -> int:
        """Its exit status."""
        return self.popen.returncode

    def ask_to_stop(self) -> None:
        """After its step, with a checkpoint."""
        if self.popen.stdin is not None:
            with suppress(OSError):
                self.popen.stdin.close()

    def problem(self) -> str | None:
        """Why it is not finished, in one sentence; None if it is."""
        if self.code == FINISHED and is_finished(self.run, self.folder):  # what a plug-in ends may have any status
            return None
        if "failed" in self.last:
            return str(self.last["failed"])
        again = "begin the study again to go on with it"
        if self.code == STOPPED:
            return f"it was stopped by a signal; {again}"
        if self.code < 0:
            name = signal.Signals(-self.code).name
            hint = ", as where memory runs out" if name == "SIGKILL" else ""
            return f"it was killed by {name}{hint}; {again}"
        *_, last = ("it printed nothing", *filter(str.strip, self.log.read_text("utf-8", "replace").split("\n")))
        return f"{last.strip()} (exit status {self.code}; {self.log} has more)"

    def _listen(self) -> None:
        for line in self.popen.stdout or ():
            with suppress(ValueError):
                self.messages.put((self, json.loads(line)))
        self.popen.wait()
        if self.popen.stdout is not None:
            self.popen.stdout.close()
        self.ask_to_stop()
        self.messages.put((self, None))
