"""A study from its runs to its report; several runs at once, each in its own process.

Finished runs are skipped; stopped or killed ones resume from their checkpoint. A run's process writes a checkpoint and
stops when its input pipe closes: on a request to stop, or when this process dies. Runs share the study's lock, so no
second process can start the study while one of them still writes.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, Literal

import torch

from ...registry import format_duration
from ...training.checkpoint.files import CheckpointError, checkpoints, find
from ...training.checkpoint.status import StatusWriter
from ...training.interrupt import StopRequest
from ...training.monitoring.metrics_file import METRICS_FILE
from ..figures.libraries import PlotsMissingError
from . import lock, results_file, speed
from .plan import Plan, PlannedRun
from .report import REPORT_FILE, write_report
from .results import Results, SpeedResult
from .run_results import JOBS_FILE, RUNS, collect_results, is_finished, is_same, tuned
from .study import StudyFileError
from .tables import write_tables
from .worker import FINISHED, STOPPED

PROGRAM = (sys.executable, "-P", "-c", f"from {__package__}.worker import main; main()")
LOGS = "logs"
Message = dict[str, Any]
"""Message of a run's process: a step and its loss, an evaluation, or the reason of a failure."""


class Observer:
    """Receiver of a study's events; this base class reports each as a line of text."""

    def __init__(self, on_note: Callable[[str], object]) -> None:
        self.note = on_note
        """Function that shows a line to the user."""

    def begin(self, runs: Sequence[PlannedRun], total: int) -> None:
        """Handle the start of a study: `runs` are those not finished yet, `total` is the number of all its runs."""
        if finished := total - len(runs):
            self.note(f"{finished} of {total} runs are finished already")

    def started(self, run: PlannedRun) -> None:
        """Handle the start of a run, new or resumed."""
        self.note(f"{run.name} begins")

    def moved(self, run: PlannedRun, message: Message) -> None:
        """Handle a message on the progress of a run."""

    def ended(self, run: PlannedRun, problem: str | None) -> None:
        """Handle the end of a run; `problem` is the reason of a failure, or None."""
        self.note(f"{run.name} is finished" if problem is None else f"{run.name} failed: {problem}")

    def timing(self, what: str) -> None:
        """Handle a speed measurement after the runs; `what` describes it."""


@dataclass
class StudyOutcome:
    """Outcome of the runs of a study."""

    failed: dict[str, str] = field(default_factory=dict)
    """Reasons of failures, by name of the run."""
    stopped: bool = False
    """True if a stop was requested, or the time budget was spent, before all runs were finished."""
    out_of_time: bool = False
    """True if the time budget was the reason."""
    finished: int = 0
    """Number of runs trained to the end, earlier calls included."""

    @property
    def state(self) -> Literal["finished", "failed", "stopped", "interrupted"]:
        """State in which the study ended: `stopped` at its time budget, `interrupted` on request."""
        if self.stopped:
            return "stopped" if self.out_of_time else "interrupted"
        return "failed" if self.failed else "finished"


def run_study(
    plan: Plan, folder: Path, *, jobs: int | None, observer: Observer, budget: float | None = None
) -> tuple[Results, StudyOutcome]:
    """Run or resume a study, and write its results, tables, report and status.

    The first Ctrl-C (or SIGTERM) stops the runs, each with a checkpoint, and so does the end of the time budget.

    Args:
        plan: the study.
        folder: its folder.
        jobs: number of runs that train at once; None for `default_jobs`.
        observer: receives the events.
        budget: time budget of the runs, in seconds; None for no limit.

    Raises:
        StudyError: another process runs the study, or the folder cannot be written.
    """
    end = math.inf if budget is None else time.monotonic() + budget
    status = StatusWriter(folder, len(plan.runs), lists_failures=True)
    try:
        with lock.hold_lock(folder, observer.note), status.recording():
            jobs = jobs or default_jobs(plan.study.threads)
            with StopRequest() as stop:
                outcome = make_runs(
                    plan,
                    folder,
                    jobs=jobs,
                    observer=observer,
                    stop=lambda: stop.was_made() or time.monotonic() >= end,
                    status=status,
                )
                outcome.out_of_time = outcome.stopped and not stop.was_made()
            status.outcome = outcome.state, _reason(outcome, len(plan.runs), budget)
            collected = _write(plan, folder, outcome.failed)
            if not outcome.stopped and (timed := speed.measure(plan, folder, observer.timing)):
                collected = _write(plan, folder, outcome.failed, timed)
            return collected, outcome
    except OSError as error:
        raise StudyFileError(f"a study cannot be written to {folder}: {error.strerror or error}") from error


def _reason(outcome: StudyOutcome, total: int, budget: float | None) -> str:
    """Return why a study ended, in one sentence."""
    done = f"{outcome.finished} of {total} runs are finished"
    reasons = {
        "finished": done,
        "failed": f"{len(outcome.failed)} of {total} runs failed",
        "stopped": f"the time budget of {format_duration(budget or 0)} is spent: {done}",
        "interrupted": f"a signal asked the study to stop: {done}",
    }
    return reasons[outcome.state]


def _write(plan: Plan, folder: Path, failed: Mapping[str, str], timed: SpeedResult | None = None) -> Results:
    collected = collect_results(plan, folder, failed=failed, speed=timed)
    results_file.write(collected, folder)
    write_tables(collected, folder)
    try:
        write_report(collected, folder)
    except PlotsMissingError:
        (folder / REPORT_FILE).unlink(missing_ok=True)  # an old report would show other results
    return collected


def make_runs(
    plan: Plan,
    folder: Path,
    *,
    jobs: int,
    observer: Observer,
    stop: Callable[[], bool] = lambda: False,
    status: StatusWriter | None = None,
) -> StudyOutcome:
    """Train the runs that are not finished, `jobs` at once, each on one of the GPUs if there are any.

    Runs that tune the learning rate come first; the others begin when all of these have ended. The caller must hold the
    folder's lock. `stop` is polled; once it returns True, no further run starts, and running ones stop with a
    checkpoint. `status` is kept up to date.
    """
    plan = tuned(plan, folder, {})
    unfinished = [run for run in plan.runs if not is_finished(run, folder / RUNS / run.name)]
    observer.begin(unfinished, len(plan.runs))
    waiting = [run for run in unfinished if not run.awaits_learning_rate]
    later = [run.name for run in unfinished if run.awaits_learning_rate]
    outcome = StudyOutcome(finished=len(plan.runs) - len(unfinished))
    if status is not None:
        status.begin(outcome.finished)
    messages = Queue[tuple["_Process", Message | None]]()
    at_once = min(jobs, len(unfinished))
    slots = list(range(jobs))
    running = set["_Process"]()
    gpus = visible_gpus()
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running or later:
            if not outcome.stopped and stop():
                outcome.stopped = True
                waiting = []
                later = []
                for process in running:
                    process.ask_to_stop()
            if later and not (waiting or running):
                plan = tuned(plan, folder, outcome.failed)
                for run in (run for run in plan.runs if run.name in later):
                    if run.awaits_learning_rate:
                        outcome.failed[run.name] = "no learning rate is chosen, as every run that tunes it failed"
                        observer.ended(run, outcome.failed[run.name])
                    elif is_finished(run, folder / RUNS / run.name):
                        outcome.finished += 1
                        observer.ended(run, None)
                    else:
                        waiting.append(run)
                later = []
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
            outcome.finished += problem is None
            if status is not None:
                status.update(at_once=True, step=outcome.finished, failed=dict(outcome.failed))
    finally:
        for process in running:  # a second Ctrl-C, or an error in this process
            process.popen.kill()
        for process in running:
            process.popen.wait()
    return outcome


def default_jobs(threads: int) -> int:
    """Return how many runs to train at once: one per GPU, or without GPUs one per `threads` cores."""
    if gpus := visible_gpus():
        return len(gpus)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // threads)


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, as in CUDA_VISIBLE_DEVICES."""
    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[:count] if names else [str(index) for index in range(count)]


def _clear(run: PlannedRun, folder: Path, observer: Observer) -> None:
    """Prepare a run's folder: keep one that the run can resume from, and move or delete any other."""
    if folder.exists() and not checkpoints(folder):
        shutil.rmtree(folder)  # the run was killed before its first checkpoint
    elif folder.exists() and (reason := _restart_reason(run, folder)):
        places = (folder.with_name(f"{folder.name}.before-{number}") for number in count(1))
        aside = folder.rename(next(place for place in places if not place.exists()))
        observer.note(f"{run.name} {reason} and is trained again; the old run is now {aside}")


def _restart_reason(run: PlannedRun, folder: Path) -> str | None:
    """Return the reason why an unfinished run cannot resume from its checkpoints; None if it can."""
    if not is_same(run, folder):
        return "has a different configuration than before"
    try:
        step = find(folder).manifest.step
    except CheckpointError:
        return "has no intact checkpoint"
    # from the last step, resuming would train and measure nothing
    return f"lacks measurements in {METRICS_FILE}" if step == run.config.training.steps else None


class _Process:
    """Subprocess that trains one run, with the messages that it sends."""

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
        # the runs of a study form a group in W&B, unless the user has set another one
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
                start_new_session=True,  # Ctrl-C reaches only this process, which asks the runs to stop
                pass_fds=lock.descriptors,
            )
        request = {"config": run.config.model_dump(mode="json"), "folder": str(self.folder), "threads": threads}
        assert self.popen.stdin is not None
        with suppress(OSError):  # the process has died already; its log has the reason
            self.popen.stdin.write(json.dumps(request) + "\n")
            self.popen.stdin.flush()
        Thread(target=self._listen, daemon=True).start()

    @property
    def code(self) -> int:
        """Exit status of the process."""
        return self.popen.returncode

    def ask_to_stop(self) -> None:
        """Ask the run to stop after its current step, with a checkpoint."""
        if self.popen.stdin is not None:
            with suppress(OSError):
                self.popen.stdin.close()

    def problem(self) -> str | None:
        """Return the reason why the run is not finished, in one sentence; None if it is finished."""
        # the folder counts, not only the exit status: a plug-in may exit with any status
        if self.code == FINISHED and is_finished(self.run, self.folder):
            return None
        if "failed" in self.last:
            return str(self.last["failed"])
        remedy = "rerun the same command to resume"
        if self.code == STOPPED:
            return f"stopped by a signal: {remedy}"
        if self.code < 0:
            name = signal.Signals(-self.code).name
            hint = " (perhaps out of memory)" if name == "SIGKILL" else ""
            return f"killed by {name}{hint}: {remedy}"
        *_, last = ("it printed nothing", *filter(str.strip, self.log.read_text("utf-8", "replace").split("\n")))
        return f"{last.strip()} (exit status {self.code}; full output: {self.log})"

    def _listen(self) -> None:
        for line in self.popen.stdout or ():
            with suppress(ValueError):
                self.messages.put((self, json.loads(line)))
        self.popen.wait()
        if self.popen.stdout is not None:
            self.popen.stdout.close()
        self.ask_to_stop()
        self.messages.put((self, None))
