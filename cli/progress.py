"""Progress of a run on the console: a progress bar, evaluations, and the command to resume."""

import math
import os
import shlex
import time
from collections import deque
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..data import Source
from ..registry import format_duration
from ..training.config import RunConfig, TrainingConfig
from ..training.interrupt import StopRequest
from ..training.monitoring.events import Compiled, Evaluated, Event, Noted, OutOfTime, Started, Stepped, StoppedEarly
from ..training.run import train
from .console import terminal

NATS_PER_BIT = math.log(2)
SECONDS_BETWEEN_LINES = 10.0
"""Minimum time between progress lines without a terminal, in seconds."""


class Followed(NamedTuple):
    """Outcome of a run."""

    state: Literal["finished", "stopped", "interrupted"]
    """`finished`, after all steps or by early stopping; `stopped`, at its time budget; `interrupted`, on request."""
    source: Source | None
    """Training data; None if training did not start."""


def run_with_progress(config: RunConfig, run: Path, *, resume: bool = False, device: str | None = None) -> Followed:
    """Train a new or resumed run, and show its progress.

    The first Ctrl-C (or SIGTERM) stops training after the current step, with a checkpoint; the second stops at once.

    Raises:
        SeqmixError: training cannot start or continue.
    """
    console = terminal(quiet=os.environ.get("RANK", "0") != "0")  # only rank 0 prints
    with StopRequest() as stop:
        events = train(config, run, resume=resume, stop=stop.was_made, device=device)
        followed = follow(events, config.training, console)
    quoted = shlex.quote(str(run))
    if followed.state != "finished":
        console.print(f"stopped with a checkpoint; resume with: seqmix train --resume {quoted}")
    elif followed.source is None or followed.source.tokenizer is not None:
        console.print(f'try it: seqmix generate {quoted} --prompt "def "')
    return followed


def follow(events: Iterable[Event], settings: TrainingConfig, console: Console) -> Followed:
    """Show the events of a run, and return how it ended."""
    steps = Steps(console, settings)
    source = None
    done = 0
    stopped_early = False
    out_of_time = False
    try:
        for event in events:
            done = event.step
            match event:
                case Started():
                    source = event.source
                    console.print(_describe_start(event, settings.steps))
                    if settings.compile:
                        console.print("compiling in the first step: seconds to minutes for each kind of block")
                    steps.start(done)  # only now: if training cannot start, only the error is shown
                case Noted():
                    console.print(event.text)
                case Compiled():
                    console.print(f"compiled {event.kinds} kind(s) of block in {event.seconds:.0f} s")
                case Stepped():
                    steps.step(event)
                case Evaluated():
                    console.print(_describe_evaluation(event, source))
                case StoppedEarly():
                    stopped_early = True
                    console.print(
                        f"step {done}: stopped early: no evaluation was better than the one at step {event.best_step}, "
                        f"with {event.best_loss:.4f} nats/token"
                    )
                case OutOfTime():
                    out_of_time = True
                    console.print(f"step {done}: the time budget of {format_duration(event.seconds)} is spent")
    finally:
        steps.stop()
    if stopped_early or done >= settings.steps:
        return Followed("finished", source)
    return Followed("stopped" if out_of_time else "interrupted", source)


class Steps:
    """Display of a run's steps: a progress bar on a terminal, an occasional line in a file or pipe."""

    def __init__(self, console: Console, settings: TrainingConfig) -> None:
        self.console = console
        self.settings = settings
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[measured]}"),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task("train", total=settings.steps, measured="")
        self.recent: deque[tuple[float, float]] = deque(maxlen=20)
        """Two numbers for each recent step: tokens per second, and seconds since the step before it, evaluations
        included."""
        self.last_step_time = time.monotonic()
        self.last_line_time = -math.inf

    def start(self, done: int) -> None:
        """Show the bar, with `done` completed steps."""
        self.bar.update(self.task, completed=done)
        if self.console.is_terminal:
            self.bar.start()

    def step(self, event: Stepped) -> None:
        """Advance the bar, or print a line if one is due."""
        now = time.monotonic()
        steps = self.settings.steps
        self.recent.append((event.tokens_per_second, now - self.last_step_time))
        self.last_step_time = now
        speed, seconds = (median(each) for each in zip(*self.recent, strict=True))
        measured = _describe_step(event, speed)
        self.bar.update(self.task, completed=event.step, measured=measured)
        is_due = now - self.last_line_time >= SECONDS_BETWEEN_LINES and event.step % self.settings.log_every == 0
        if not self.console.is_terminal and (is_due or event.step == steps):
            self.last_line_time = now
            left = timedelta(seconds=round((steps - event.step) * seconds))
            self.console.print(f"step {event.step} of {steps}: {measured}, {left} left")

    def stop(self) -> None:
        """Stop the bar, and leave it on the screen."""
        if self.bar.live.is_started:
            self.bar.stop()


def _describe_start(event: Started, steps: int) -> str:
    """Describe the model, the device and the data."""
    source = event.source
    device = f"{event.device}" if event.processes == 1 else f"{event.processes} processes ({event.device.type})"
    line = f"{event.parameters:,} parameters on {device}, {event.precision}; {source.name}: {source.summary}"
    return line + (f"\nresumed after step {event.step} of {steps}" if event.step else "")


def _describe_step(event: Stepped, speed: float) -> str:
    """Describe loss, throughput, utilization and memory."""
    parts = [f"loss {event.loss:.3f}", f"{speed:,.0f} tokens/s"]
    if event.mfu is not None:
        parts.append(f"{event.mfu:.0%} of peak")
    if event.memory_bytes is not None:
        parts.append(f"{event.memory_bytes / 2**30:.1f} GiB")
    return ", ".join(parts)


def _describe_evaluation(event: Evaluated, source: Source | None) -> str:
    """Describe an evaluation in one line: nats per token, bits per byte of a text, accuracy of a task.

    The final evaluation is compared with the entropy of the token frequencies (a unigram model).
    """
    bytes_per_token = None if source is None else source.bytes_per_token
    entropy = None if source is None else source.unigram_entropy
    token = "byte" if bytes_per_token == 1 else "token"

    def format_loss(loss: float) -> str:
        bits = "" if bytes_per_token is None else f", {loss / NATS_PER_BIT / bytes_per_token:.4f} bits/byte"
        return f"{loss:.4f} nats/{token}{bits}"

    line = f"step {event.step}: validation {format_loss(event.loss)} over {event.tokens:,} {token}s"
    line += "".join(f", {loss:.4f} at {length} tokens" for length, loss in event.by_length.items())
    if event.accuracy is not None:
        line += f", {event.accuracy:.1%} right"
        for axis, accuracies in event.accuracy_by.items():
            line += f"; {axis} " + ", ".join(f"{value}: {accuracy:.1%}" for value, accuracy in accuracies.items())
    if event.final and entropy is not None:
        line += f"; {token} frequencies alone: {format_loss(entropy)}"
        if entropy > 0:  # 0 for a single repeated token
            line += f" ({abs(1 - event.loss / entropy):.0%} {'below' if event.loss < entropy else 'above'})"
    return line
