"""A run on the terminal: a progress bar, the evaluations, and how to go on."""

import math
import os
import shlex
import time
from collections import deque
from datetime import timedelta
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..data import Source
from ..training.config import RunConfig, TrainingConfig
from ..training.events import Compiled, Evaluated, Noted, Saved, Started, Stepped, StoppedEarly
from ..training.interrupt import StopRequest
from ..training.run import train
from .console import terminal

NATS_PER_BIT = math.log(2)
SECONDS_BETWEEN_LINES = 10.0
"""At least so long, where there is no terminal to draw on."""


def run_with_progress(config: RunConfig, run: Path, *, resume: bool = False) -> bool:
    """Train, and show it. The first Ctrl-C (or SIGTERM) stops after the step, with a checkpoint; the second at once.

    Returns:
        Whether training has ended: all steps are made, or further ones would make it no better.

    Raises:
        SeqmixError: training cannot start or go on.
    """
    console = terminal(quiet=os.environ.get("RANK", "0") != "0")  # of several processes, the first one speaks
    shown = Bar(console, config.training.steps) if console.is_terminal else Lines(console, config.training)
    source, done, early = None, 0, False
    try:
        with StopRequest() as stop:
            for event in train(config, run, resume=resume, stop=stop.made):
                done = event.step
                match event:
                    case Started():
                        source = event.source
                        console.print(_start(event, config.training.steps))
                        if config.training.compile:
                            console.print("the first step compiles: seconds to minutes for each kind of block")
                        shown.start(done)  # not before: what cannot start shows its error and nothing else
                    case Noted():
                        console.print(event.text)
                    case Compiled():
                        console.print(f"compiled {event.kinds} kind(s) of block in {event.seconds:.0f} s")
                    case Stepped():
                        shown.step(event)
                    case Evaluated():
                        console.print(_evaluation(event, source))
                    case StoppedEarly():
                        early = True
                        console.print(_stopped_early(event))
                    case Saved():
                        pass
    finally:
        shown.stop()
    quoted = shlex.quote(str(run))
    if done < config.training.steps and not early:
        console.print(f"stopped with a checkpoint; go on with: seqmix train --resume {quoted}")
        return False
    if source is None or source.tokenizer is not None:
        console.print(f'try it: seqmix generate {quoted} --prompt "def "')
    return True


class Bar:
    """Steps on a terminal: a bar that moves."""

    def __init__(self, console: Console, steps: int) -> None:
        self.progress = Progress(
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
        self.task = self.progress.add_task("train", total=steps, measured="")
        self.speeds = Speeds()

    def start(self, done: int) -> None:
        """Draw it, `done` steps being made."""
        self.progress.update(self.task, completed=done)
        self.progress.start()

    def step(self, event: Stepped) -> None:
        """Move it."""
        self.progress.update(self.task, completed=event.step, measured=_measured(event, self.speeds.add(event)))

    def stop(self) -> None:
        """Leave it as it is."""
        if self.progress.live.is_started:
            self.progress.stop()


class Lines:
    """Steps in a file or a pipe: a line now and then."""

    def __init__(self, console: Console, settings: TrainingConfig) -> None:
        self.console, self.settings = console, settings
        self.speeds = Speeds()
        self.printed = -math.inf
        """When the last line was."""

    def start(self, done: int) -> None:
        """The steps begin."""

    def step(self, event: Stepped) -> None:
        """Print a line if one is due."""
        speed, now, steps = self.speeds.add(event), time.monotonic(), self.settings.steps
        if event.step % self.settings.log_every and event.step < steps:
            return
        if now - self.printed >= SECONDS_BETWEEN_LINES or event.step == steps:
            self.printed = now
            # the length of a step is in its speed
            left = (steps - event.step) * self.speeds.seconds
            self.console.print(f"step {event.step} of {steps}: {_measured(event, speed)}, {_duration(left)} left")

    def stop(self) -> None:
        """The steps are over."""


class Speeds:
    """What the last steps took."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, float]] = deque(maxlen=20)
        self._before = time.monotonic()

    def add(self, event: Stepped) -> float:
        """Tokens a second, with those of this step."""
        now = time.monotonic()
        self._recent.append((event.tokens_per_second, now - self._before))
        self._before = now
        return median(speed for speed, _ in self._recent)

    @property
    def seconds(self) -> float:
        """From a step to the next, evaluations aside."""
        return median(seconds for _, seconds in self._recent)


def _start(event: Started, steps: int) -> str:
    """What is trained, and on what."""
    source = event.source
    where = f"{event.device}" if event.processes == 1 else f"{event.processes} processes ({event.device.type})"
    line = f"{event.parameters:,} parameters on {where}, {event.precision}; {source.name}: {source.summary}"
    return line + (f"\nresumed after step {event.step} of {steps}" if event.step else "")


def _measured(event: Stepped, speed: float) -> str:
    """Loss, speed, and what they take."""
    parts = [f"loss {event.loss:.3f}", f"{speed:,.0f} tokens/s"]
    if event.mfu is not None:
        parts.append(f"{event.mfu:.0%} of peak")
    if event.memory_bytes is not None:
        parts.append(f"{event.memory_bytes / 2**30:.1f} GiB")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _stopped_early(event: StoppedEarly) -> str:
    return (
        f"step {event.step}: stopped, for no evaluation has been better than that of step {event.best_step}: "
        f"{event.best_loss:.4f} nats/token"
    )


def _evaluation(event: Evaluated, source: Source | None) -> str:
    """One line: nats a token, of text bits a byte, of a task the share of right answers.

    At the end, how far below the frequencies of tokens alone.
    """
    bytes_per_token = None if source is None else source.bytes_per_token
    entropy = None if source is None else source.unigram_entropy
    token = "byte" if bytes_per_token == 1 else "token"

    def shown(loss: float) -> str:
        bits = "" if bytes_per_token is None else f", {loss / NATS_PER_BIT / bytes_per_token:.4f} bits/byte"
        return f"{loss:.4f} nats/{token}{bits}"

    line = f"step {event.step}: validation {shown(event.loss)}"
    line += "".join(f", {loss:.4f} at {length} tokens" for length, loss in event.by_length.items())
    if event.accuracy is not None:
        line += f", {event.accuracy:.1%} right"
        for axis, shares in event.accuracy_by.items():
            line += f"; {axis} " + ", ".join(f"{value}: {share:.1%}" for value, share in shares.items())
    if event.final and entropy is not None:
        line += (
            f"; {token} frequencies alone: {shown(entropy)} "
            f"({abs(1 - event.loss / entropy):.0%} {'below' if event.loss < entropy else 'above'})"
        )
    return line
