"""A study on the terminal: a bar over all runs and one for each active run; plain lines without a terminal."""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ..experiments.plan import PlannedRun
from ..experiments.runner import Message, Observer
from .progress import SECONDS_BETWEEN_LINES


class Forecast:
    """Progress of a study and the time left; runs are weighted by their FLOPs."""

    def __init__(self, weights: dict[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self.weights = weights
        self.clock = clock
        """FLOPs of each run that is not finished."""
        self.shares: dict[str, float] = {}
        self.first: dict[str, float] = {}
        """Shares at the start, done by an earlier call."""
        self.began = clock()

    def move(self, run: str, share: float) -> None:
        """Record the share of a run that is done."""
        self.first.setdefault(run, share)
        self.shares[run] = share

    @property
    def share(self) -> float:
        """The share of all work that is done."""
        total = sum(self.weights.values())
        return sum(self.weights[run] * share for run, share in self.shares.items()) / total if total else 1.0

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None before there is one."""
        made = sum(self.weights[run] * (share - self.first[run]) for run, share in self.shares.items())
        if made <= 0:
            return None
        return (1 - self.share) * sum(self.weights.values()) / made * (self.clock() - self.began)


class StudyProgress(Observer):
    """Shows the progress; a context manager that stops the bars at the end."""

    def __init__(self, console: Console) -> None:
        super().__init__(console.print)
        self.console = console
        self.forecast = Forecast({})
        self.left = 0
        self.total = 0
        """Unfinished runs, and all runs."""
        self.tasks: dict[str, TaskID] = {}
        self.printed = 0.0
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
        self._move_whole()
        if self.bar.live.is_started:
            self.bar.stop()

    def begin(self, runs: Sequence[PlannedRun], total: int) -> None:
        """Draw a bar over all runs."""
        self.forecast = Forecast({run.name: run.flops for run in runs})
        self.left = len(runs)
        self.total = total
        super().begin(runs, total)
        self._move_whole()
        if self.console.is_terminal:
            self.bar.start()

    def started(self, run: PlannedRun) -> None:
        """Add a bar for a run."""
        self.tasks[run.name] = self.bar.add_task(run.name, total=run.config.training.steps, value="starting")
        if not self.console.is_terminal:
            super().started(run)

    def moved(self, run: PlannedRun, message: Message) -> None:
        """Advance the bar of a run, and the bar over all runs."""
        if "step" not in message:
            return
        steps = run.config.training.steps
        step = message["step"]
        self.forecast.move(run.name, step / steps)
        value = f"loss {message['loss']:.3f}" if "loss" in message else f"validation {message['validation_loss']:.4f}"
        self.bar.update(self.tasks[run.name], completed=step, value=value)
        self._move_whole()
        if not self.console.is_terminal and time.monotonic() - self.printed >= SECONDS_BETWEEN_LINES:
            self.printed = time.monotonic()
            left = f"; {left}" if (left := self._left()) else ""
            self.console.print(f"{self._count()}, {run.name} at step {step} of {steps}, {value}{left}")

    def ended(self, run: PlannedRun, problem: str | None) -> None:
        """Remove the bar of a run, and report how it ended."""
        self.bar.remove_task(self.tasks.pop(run.name))
        if problem is None:
            self.forecast.move(run.name, 1.0)
        else:
            self.forecast.weights.pop(run.name)
            self.forecast.shares.pop(run.name, None)
        self.left -= 1
        self._move_whole()
        super().ended(run, problem)

    def timing(self, what: str) -> None:
        """Show what is being timed, next to the bar over all runs."""
        self.bar.update(self.whole, value=f"timing {what}")

    def _move_whole(self) -> None:
        self.bar.update(self.whole, completed=self.forecast.share, description=self._count(), value=self._left())

    def _count(self) -> str:
        return f"{self.total - self.left} of {self.total} runs"

    def _left(self) -> str:
        seconds = self.forecast.seconds_left
        return "" if seconds is None else f"about {timedelta(seconds=round(seconds))} left"
