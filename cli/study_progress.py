"""Progress of a study: a bar for the whole study and one for each active run; plain lines without a terminal."""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ..lab.study.plan import PlannedRun
from ..lab.study.runner import Message, Observer
from .progress import SECONDS_BETWEEN_LINES


class Forecast:
    """Progress of a study and the remaining time; runs are weighted by their FLOPs.

    Args:
        weights: FLOPs of each unfinished run, by name.
        clock: returns the time in seconds.
    """

    def __init__(self, weights: dict[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self.weights = weights
        self.clock = clock
        self.shares: dict[str, float] = {}
        """Completed fraction of each run."""
        self.initial_shares: dict[str, float] = {}
        """Fraction of each run that was completed at its first report, by an earlier call of the command."""
        self.began = clock()
        """Time of `clock` at the start, in seconds."""

    def move(self, run: str, share: float) -> None:
        """Record the completed fraction of a run."""
        self.initial_shares.setdefault(run, share)
        self.shares[run] = share

    @property
    def share(self) -> float:
        """Completed fraction of all work."""
        total = sum(self.weights.values())
        return sum(self.weights[run] * share for run, share in self.shares.items()) / total if total else 1.0

    @property
    def seconds_left(self) -> float | None:
        """Remaining time at the present rate, in seconds; None before any work is done."""
        completed = sum(self.weights[run] * (share - self.initial_shares[run]) for run, share in self.shares.items())
        if completed <= 0:
            return None
        return (1 - self.share) * sum(self.weights.values()) / completed * (self.clock() - self.began)


class StudyProgress(Observer):
    """Display of a study's progress; a context manager that stops the bars at the end."""

    def __init__(self, console: Console) -> None:
        super().__init__(console.print)
        self.console = console
        self.forecast = Forecast({})
        self.left = 0
        """Number of unfinished runs."""
        self.total = 0
        """Number of all runs."""
        self.tasks: dict[str, TaskID] = {}
        self.last_line_time = 0.0
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[value]}"),
            console=console,
            refresh_per_second=4,
        )
        self.whole = self.bar.add_task("", total=1.0, value="")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for task in self.tasks.values():
            self.bar.remove_task(task)
        self._update_whole()
        if self.bar.live.is_started:
            self.bar.stop()

    def begin(self, runs: Sequence[PlannedRun], total: int) -> None:
        """Show a bar for the whole study, in which `runs`, out of `total`, are not finished."""
        self.forecast = Forecast({run.name: run.flops for run in runs})
        self.left = len(runs)
        self.total = total
        super().begin(runs, total)
        self._update_whole()
        if self.console.is_terminal:
            self.bar.start()

    def started(self, run: PlannedRun) -> None:
        """Add a bar for a run."""
        self.tasks[run.name] = self.bar.add_task(run.name, total=run.config.training.steps, value="starting")
        if not self.console.is_terminal:
            super().started(run)

    def moved(self, run: PlannedRun, message: Message) -> None:
        """Advance the bar of a run, and the bar of the study."""
        if "step" not in message:
            return
        steps = run.config.training.steps
        step = message["step"]
        self.forecast.move(run.name, step / steps)
        value = f"loss {message['loss']:.3f}" if "loss" in message else f"validation {message['validation_loss']:.4f}"
        self.bar.update(self.tasks[run.name], completed=step, value=value)
        self._update_whole()
        if not self.console.is_terminal and time.monotonic() - self.last_line_time >= SECONDS_BETWEEN_LINES:
            self.last_line_time = time.monotonic()
            time_left = f"; {text}" if (text := self._time_left()) else ""
            self.console.print(f"{self._count()}, {run.name} at step {step} of {steps}, {value}{time_left}")

    def ended(self, run: PlannedRun, problem: str | None) -> None:
        """Remove the bar of a run, and report how it ended."""
        if run.name in self.tasks:  # a run may end without a start
            self.bar.remove_task(self.tasks.pop(run.name))
        if problem is None:
            self.forecast.move(run.name, 1.0)
        else:
            self.forecast.weights.pop(run.name)
            self.forecast.shares.pop(run.name, None)
        self.left -= 1
        self._update_whole()
        super().ended(run, problem)

    def timing(self, what: str) -> None:
        """Show what is being timed, next to the bar of the study."""
        self.bar.update(self.whole, value=f"timing {what}")

    def _update_whole(self) -> None:
        self.bar.update(self.whole, completed=self.forecast.share, description=self._count(), value=self._time_left())

    def _count(self) -> str:
        return f"{self.total - self.left} of {self.total} runs"

    def _time_left(self) -> str:
        seconds = self.forecast.seconds_left
        return "" if seconds is None else f"about {timedelta(seconds=round(seconds))} left"
