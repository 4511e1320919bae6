"""One run of a study, in a process of its own: `python -c "from seqmix.experiments.worker import main; main()"`.

The first line of its input is what it makes, in JSON; the end of its input asks it to stop after the step, with a
checkpoint. So it stops, too, if whoever started it dies, in whatever way. Its output is a JSON object a line.
"""

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..registry import SeqmixError
from ..training import RunConfig, train
from ..training.events import Evaluated, Noted, Stepped
from ..training.interrupt import StopRequest
from ..training.memory import keep_freed_memory
from ..training.run_dir import CONFIG_FILE

FINISHED, FAILED, STOPPED = 0, 2, 130
"""Exit statuses."""
SECONDS_BETWEEN_STEPS = 0.2
"""At least so long between two steps that are reported."""


def main() -> None:
    """Train what the input says; exit with one of the statuses."""
    asked = json.loads(sys.stdin.readline())
    folder = Path(asked["folder"])
    torch.set_num_threads(asked["threads"])
    keep_freed_memory()
    try:
        config = RunConfig.model_validate(asked["config"])
        with StopRequest() as stop:
            threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
            done = _train(config, folder, stop)
    except SeqmixError as error:
        _tell(failed=str(error))
        sys.exit(FAILED)
    sys.exit(FINISHED if done == config.training.steps else STOPPED)


def _train(config: RunConfig, folder: Path, stop: StopRequest) -> int:
    """Begin, or go on; the last step that was made."""
    done, reported = 0, 0.0
    for event in train(config, folder, resume=(folder / CONFIG_FILE).exists(), stop=stop.made):
        done = event.step
        match event:
            case Stepped() if time.monotonic() - reported > SECONDS_BETWEEN_STEPS:
                reported = time.monotonic()
                _tell(step=done, loss=event.loss)
            case Evaluated():
                _tell(step=done, validation_loss=event.loss)
            case Noted():
                sys.stderr.write(f"step {done}: {event.text}\n")
    return done


def _tell(**values: Any) -> None:
    with suppress(OSError):  # nobody listens any more: the checkpoint is still to be written
        sys.stdout.write(json.dumps(values) + "\n")
        sys.stdout.flush()


def _stop_at_end_of_input() -> None:
    # not sys.stdin, which a thread that waits holds locked while the interpreter ends
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
