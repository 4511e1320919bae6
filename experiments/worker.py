"""One run of a study, in a process of its own: `python -c "from seqmix.experiments.worker import main; main()"`.

The first line of its input is what it makes, in JSON; the end of its input asks it to stop after the step, with a
checkpoint. So it stops, too, if whoever started it dies, in whatever way. Its output is a JSON object a line; what a
plug-in prints goes where its errors go, to the run's log.
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

from ..registry import SeqmixError
from ..training import RunConfig, train
from ..training.checkpoint.run_dir import CONFIG_FILE
from ..training.interrupt import StopRequest
from ..training.monitoring.events import Evaluated, Noted, Stepped
from ..training.monitoring.memory import keep_freed_memory

FINISHED = 0
FAILED = 2
STOPPED = 130
"""Exit statuses."""
SECONDS_BETWEEN_STEPS = 0.2
"""At least so long between two steps that are reported."""


def main() -> None:
    """Train what the input says; exit with one of the statuses."""
    tell = _channel()
    asked = json.loads(sys.stdin.readline())
    folder = Path(asked["folder"])
    torch.set_num_threads(asked["threads"])
    keep_freed_memory()
    try:
        config = RunConfig.model_validate(asked["config"])
        with StopRequest() as stop:
            threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
            done = _train(config, folder, stop, tell)
    except SeqmixError as error:
        tell(failed=str(error))
        sys.exit(FAILED)
    sys.exit(FINISHED if done == config.training.steps else STOPPED)


def _train(config: RunConfig, folder: Path, stop: StopRequest, tell: Callable[..., None]) -> int:
    """Begin, or go on; the last step that was made."""
    done = 0
    reported = 0.0
    for event in train(config, folder, resume=(folder / CONFIG_FILE).exists(), stop=stop.made):
        done = event.step
        match event:
            case Stepped() if time.monotonic() - reported > SECONDS_BETWEEN_STEPS:
                reported = time.monotonic()
                tell(step=done, loss=event.loss)
            case Evaluated():
                tell(step=done, validation_loss=event.loss)
            case Noted():
                sys.stderr.write(f"step {done}: {event.text}\n")
    return done


def _channel() -> Callable[..., None]:
    """What writes an object to the output, which is kept from everybody else."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**values: Any) -> None:
        with suppress(OSError):  # nobody listens any more: the checkpoint is still to be written
            output.write(json.dumps(values) + "\n")
            output.flush()

    return tell


def _stop_at_end_of_input() -> None:
    # not sys.stdin, which a thread that waits holds locked while the interpreter ends
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
