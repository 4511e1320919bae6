"""Commands that read a run while it trains and keeps its newest checkpoint alone: each finds a whole one.

A trainer in another process writes a checkpoint a step and removes the one before.
"""

import atexit
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from abuse.commands import SMALL, environment
from abuse.tally import Case

from seqmix.cli.app import main

ROUNDS = 12
"""How often each command is tried."""
READS = {
    "generate": ["generate", "run", "--prompt", "a", "--max-new-tokens", "2", "--no-compile"],
    "evaluate": ["evaluate", "run", "--length", "16", "--tokens", "16"],
    "export": ["export", "run", "--out", "{new}.safetensors"],
    "average": ["average", "run", "{new}"],
    "plot": ["plot", "run", "--out", "{new}.html"],
    "inspect": ["inspect", "run", "--text", "text.txt", "--out", "{new}.html"],
    "start": ["train", "retnet-tiny", *SMALL, "training.start_from=run", "--out", "{new}"],
    "resume": ["train", "--resume", "run"],
}
REFUSED = {"resume"}
"""What may not be done to a run that trains."""


class _Trainer:
    """A run that trains in another process, from the first time that somebody asks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.process = folder, None

    def run(self) -> None:
        """Train, if it does not yet; return when there are two checkpoints."""
        if self.process is not None and self.process.poll() is None:
            return
        (self.folder / "text.txt").write_text("the text of a small run, over and over again. " * 60)
        command = [sys.executable, "-m", "seqmix", "train", "retnet-tiny", *SMALL, "training.steps=1000000"]
        command += ["training.keep_checkpoints=2", "--out", "run"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, cwd=self.folder, env=environment(), **quiet)
        atexit.register(self.process.kill)
        end = time.monotonic() + 120
        while len(list(self.folder.glob("run/checkpoints/step-*/*.json"))) < 2:
            assert time.monotonic() < end, "it does not train"
            assert self.process.poll() is None, f"it ended with {self.process.returncode}"
            time.sleep(0.1)

    def stop(self) -> None:
        """It still trains, and ends with a checkpoint when it is asked to."""
        self.run()
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(100) in (0, 130, 143), f"status {self.process.returncode}"


def readers(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Every command that reads a run, time and again."""
    trainer = _Trainer(folder)
    for number in range(ROUNDS):
        for name, arguments in READS.items():
            made = [each.format(new=f"{name}{number}") for each in arguments]
            yield Case(f"{name}, {number}", partial(_read, trainer, made, name in REFUSED), refused=False)
    yield Case("the trainer", trainer.stop, refused=False)


def _read(trainer: _Trainer, arguments: list[str], refused: bool) -> None:
    trainer.run()
    errors, status = StringIO(), 0
    with chdir(trainer.folder), patch.object(sys, "argv", ["seqmix", *arguments]):
        try:
            with redirect_stdout(StringIO()), redirect_stderr(errors):
                main()
        except SystemExit as ended:
            status = int(ended.code or 0)
    assert "Traceback" not in errors.getvalue(), errors.getvalue()[-200:]
    assert (status in (2, 3)) == refused, f"status {status}: {errors.getvalue()[-300:]}"
    assert trainer.process is not None
    assert trainer.process.poll() is None, "the trainer has ended"
