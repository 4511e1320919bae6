"""Ctrl-C and other signals at any moment of a training: no traceback, the status of an interrupted command, no half
file under the name of a whole one, and the run goes on.
"""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from abuse.commands import SMALL, environment
from abuse.tally import Case

from seqmix import load_config, train
from seqmix.training import read_config
from seqmix.training.checkpoint.files import checkpoints, verify

ROUNDS = 3
SENT = {
    "Ctrl-C": (signal.SIGINT,),
    "Ctrl-C twice": (signal.SIGINT, signal.SIGINT),
    "SIGTERM": (signal.SIGTERM,),
    "Ctrl-C and SIGTERM": (signal.SIGINT, signal.SIGTERM),
    "SIGHUP": (signal.SIGHUP,),
}
PARTS = {"its start": 0, "its first files": 1, "its steps": 2}
"""When: by what is there of the run, which takes a different time on every machine."""
ENDED = {130, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP}
"""130 after a checkpoint, or where a command was at work; otherwise the signal's own end."""


def interrupts(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Signals in every part of a training."""
    (folder / "text.txt").write_text("the text of a small run, over and over again. " * 60)
    for number, (part, (name, signals)) in enumerate(
        (part, sent) for _ in range(ROUNDS) for part in PARTS for sent in SENT.items()
    ):
        after, between = drawn.uniform(0, 4 if part == "its start" else 0.3), drawn.uniform(0, 0.05)
        sent = partial(_interrupt, folder / f"{number}", part, signals, after, between)
        yield Case(f"{name} in {part}, {after:.2f} and {between:.3f} s", sent, refused=False)


def _interrupt(run: Path, part: str, signals: tuple[signal.Signals, ...], after: float, between: float) -> None:
    small = [*SMALL, f"data.paths=[{run.parent / 'text.txt'}]"]
    settings = ["training.steps=1000000", "training.keep_checkpoints=3"]
    ignored = signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs in the background ignores it
    process = subprocess.Popen(
        [sys.executable, "-m", "seqmix", "train", "retnet-tiny", *small, *settings, "--out", run.name],
        cwd=run.parent,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    signal.signal(signal.SIGINT, ignored)
    try:
        awaited = ("", "config.yaml", "metrics.jsonl")[PARTS[part]]
        end = time.monotonic() + 300
        while not (run / awaited).exists() and awaited:
            assert time.monotonic() < end, "it does not train"
            time.sleep(0.01)
        time.sleep(after)
        for number in signals:
            process.send_signal(number)
            time.sleep(between)
        said, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert "Traceback" not in said, said[-400:]
    assert "Error" not in said, said[-400:]
    assert process.returncode in ENDED, f"status {process.returncode}: {said[-300:]}"
    for checkpoint in checkpoints(run):
        verify(checkpoint)
    if (run / "config.yaml").exists():
        done = int(checkpoints(run)[-1].name.removeprefix("step-")) if checkpoints(run) else 0
        steps = [event.step for event in train(read_config(run, [f"training.steps={done + 2}"]), run, resume=True)]
    else:
        assert not run.exists() or not list(run.iterdir()), f"left behind: {list(run.iterdir())}"
        done, steps = 0, [event.step for event in train(load_config("retnet-tiny", small), run)]
    assert (steps[0], steps[-1]) == (done, done + 2), f"from step {done}: {steps}"
    left = [file.name for file in run.rglob("*") if file.name.startswith(".") or "partial" in file.name]
    assert not left, f"left behind: {left}"
