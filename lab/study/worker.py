"""The process of one run of a study: `python -c "from seqmix.lab.study.worker import main; main()"`.

The first line of standard input is the request, in JSON. The end of the input asks the process to stop after the
current step, with a checkpoint; the input also ends when the parent dies, in whatever way. Standard output has one JSON
object per line; what plug-ins print goes to standard error, the run's log.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ...registry import SeqmixError
from ...training import RunConfig, train
from ...training.checkpoint.run_dir import CONFIG_FILE
from ...training.interrupt import StopRequest
from ...training.monitoring.events import Evaluated, Noted, Stepped
from ...training.monitoring.memory import keep_freed_memory

FINISHED = 0
"""Exit status of a run that was trained to the end."""
FAILED = 2
"""Exit status of a run that failed with an error."""
STOPPED = 130
"""Exit status of a run that was stopped."""
SECONDS_BETWEEN_STEPS = 0.2
"""Minimum time between two reported steps, in seconds."""


def main() -> None:
    """Train the run that standard input asks for; exit with FINISHED, FAILED or STOPPED."""
    report = _channel()
    request = json.loads(sys.stdin.readline())
    folder = Path(request["folder"])
    torch.set_num_threads(request["threads"])
    keep_freed_memory()
    try:
        config = RunConfig.model_validate(request["config"])
        with StopRequest() as stop:
            threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
            last_step = _train(config, folder, stop, report)
    except SeqmixError as error:
        report(failed=str(error))
        sys.exit(FAILED)
    sys.exit(FINISHED if last_step == config.training.steps else STOPPED)


def _train(config: RunConfig, folder: Path, stop: StopRequest, report: Callable[..., None]) -> int:
    """Train the run from its start or its checkpoint; return the step of the last event."""
    step = 0
    reported = 0.0
    for event in train(config, folder, resume=(folder / CONFIG_FILE).exists(), stop=stop.was_made):
        step = event.step
        match event:
            case Stepped() if time.monotonic() - reported > SECONDS_BETWEEN_STEPS:
                reported = time.monotonic()
                report(step=step, loss=event.loss)
            case Evaluated():
                report(step=step, validation_loss=event.loss)
            case Noted():
                sys.stderr.write(f"step {step}: {event.text}\n")
    return step


def _channel() -> Callable[..., None]:
    """Return a function that writes JSON to standard output; all other output is redirected to standard error."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def report(**values: Any) -> None:
        with suppress(OSError):  # the parent is gone, but the checkpoint must still be written
            output.write(json.dumps(values) + "\n")
            output.flush()

    return report


def _stop_at_end_of_input() -> None:
    # not sys.stdin: a waiting thread would hold its lock at interpreter shutdown
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
