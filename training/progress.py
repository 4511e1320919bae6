"""A run on the terminal: a progress bar, the evaluations, and how to go on."""

import math
import shlex
import signal
from collections import deque
from pathlib import Path
from statistics import median
from types import FrameType, TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .config import RunConfig
from .loop import Compiled, Evaluated, Saved, Started, Stepped, train

NATS_PER_BIT = math.log(2)


def run_with_progress(config: RunConfig, run: Path, *, resume: bool = False) -> bool:
    """Train, and show it. The first Ctrl-C (or SIGTERM) stops after the step, with a checkpoint; the second at once.

    Returns:
        Whether all steps are made.

    Raises:
        SeqmixError: training cannot start or go on.
    """
    console = Console(markup=False)  # paths and names are no markup
    progress = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )
    task = progress.add_task("train", total=config.training.steps, loss="", speed="")
    entropy, bytes_per_token, done = math.inf, 1.0, 0
    recent: deque[float] = deque(maxlen=20)
    try:
        with StopRequest() as stop:
            for event in train(config, run, resume=resume, stop=stop.made):
                done = event.step
                match event:
                    case Started():
                        entropy, bytes_per_token = event.corpus.unigram_entropy, event.corpus.bytes_per_token
                        console.print(_start(event, config.training.steps), highlight=False)
                        progress.update(task, completed=done)
                        progress.start()  # not before: what cannot start shows its error and nothing else
                    case Compiled():
                        line = f"compiled {event.kinds} kind(s) of block in {event.seconds:.0f} s"
                        console.print(line, highlight=False)
                    case Stepped():
                        recent.append(event.tokens_per_second)
                        speed = f"{median(recent):,.0f} tokens/s"
                        progress.update(task, completed=done, loss=f"loss {event.loss:.3f}", speed=speed)
                    case Evaluated():
                        console.print(_evaluation(event, entropy, bytes_per_token), highlight=False)
                    case Saved():
                        pass
    finally:
        if progress.live.is_started:
            progress.stop()
    quoted = shlex.quote(str(run))
    if done < config.training.steps:
        console.print(f"stopped with a checkpoint; go on with: seqmix train --resume {quoted}", highlight=False)
        return False
    console.print(f'try it: seqmix generate {quoted} --prompt "def "', highlight=False)
    return True


class StopRequest:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a request that the loop asks for; the next one acts as ever."""

    # SIGHUP is a closed terminal; not every system has it
    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__
    )

    def __init__(self) -> None:
        self._made = False
        self._before = {number: signal.getsignal(number) for number in self.SIGNALS}

    def made(self) -> bool:
        """Whether a stop was asked for."""
        return self._made

    def __enter__(self) -> Self:
        for number in self.SIGNALS:
            signal.signal(number, self._request)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _request(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._made = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _start(event: Started, steps: int) -> str:
    """What is trained, and on what."""
    corpus = event.corpus
    lines = (
        f"{event.parameters:,} parameters on {event.device}, {event.precision}; {corpus.name}: "
        f"{corpus.documents:,} documents, {len(corpus.train):,} tokens to learn, "
        f"{len(corpus.validation):,} held out ({corpus.split})"
    )
    return lines + (f"\nresumed behind step {event.step} of {steps}" if event.step else "")


def _evaluation(event: Evaluated, entropy: float, bytes_per_token: float = 1.0) -> str:
    """One line: nats a token and bits a byte, and at the end how far below the token frequencies alone."""
    token = "byte" if bytes_per_token == 1 else "token"

    def shown(loss: float) -> str:
        return f"{loss:.4f} nats/{token}, {loss / NATS_PER_BIT / bytes_per_token:.4f} bits/byte"

    line = f"step {event.step}: validation {shown(event.loss)}"
    if event.final:
        line += (
            f"; {token} frequencies alone: {shown(entropy)} "
            f"({abs(1 - event.loss / entropy):.0%} {'below' if event.loss < entropy else 'above'})"
        )
    return line
