"""Memory that does not grow with the steps of a run.

    STEPS=2000 pytest -s tests/training/test_memory_flat.py

A tiny RetNet is trained by the loop of the command, with an evaluation every ten steps and a checkpoint every hundred.
After a tenth of the steps nothing may grow: a line through the measurements from there on may rise by `ALLOWED`, and
exactly as many tensors are alive after every evaluation. COMPILE=1 compiles blocks.
"""

import gc
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from seqmix.training import load_config, train
from seqmix.training.events import Evaluated, Saved, Started
from seqmix.training.memory import peak_memory

STEPS = int(os.environ.get("STEPS", "60"))
EVERY = 10  # steps between evaluations
ALLOWED = 2**21  # bytes that the process may grow by


class Held(NamedTuple):
    """The memory of the process after an evaluation: bytes now, their peak, and tensors that came after the start."""

    step: int
    bytes: int
    peak: int
    tensors: int


def measured(steps: int, folder: Path, *, compiled: bool = False) -> Iterator[Held]:
    """Train, and measure after every evaluation but the final one, which has more batches."""
    words = np.array(["what", "was", "read", "is", "saved", "and", "written", "again", "by", "others"])
    (folder / "text.txt").write_text(" ".join(np.random.default_rng(0).choice(words, 10_000)))
    changes = [
        *("model.d_model=32", "model.n_layers=2", "model.dropout=0.1", "data.sequence_length=64"),
        *(f"data.paths=[{folder / 'text.txt'}]", f"training.steps={steps}", "training.batch_size=4"),
        *(f"training.evaluate_every={EVERY}", "training.evaluation_batches=4", "training.checkpoint_every=100"),
        *("training.warmup_steps=10", "training.log_every=1", f"training.compile={str(compiled).lower()}"),
    ]
    try:
        for event in train(load_config("retnet-tiny", changes), folder / "run"):
            if isinstance(event, Started):
                gc.freeze()  # older objects are not counted again and again
            while isinstance(event, Saved) and not event.folder.exists():
                time.sleep(0.01)  # the copies that are written are alive until then
            if isinstance(event, Evaluated) and not event.final:
                gc.collect()
                alive = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
                yield Held(event.step, resident, peak_memory(torch.device("cpu")) or 0, alive)
    finally:
        gc.unfreeze()


def warm(held: Sequence[Held]) -> list[Held]:
    """The measurements after a tenth of the steps, when caches are full."""
    return [each for each in held if each.step > held[-1].step / 10]


def growth(held: Sequence[Held]) -> float:
    """Bytes by which a line through all measurements rises."""
    steps = [each.step for each in held]
    slope = np.polyfit(steps, [each.bytes for each in held], 1)[0]
    return float(slope * (steps[-1] - steps[0]))


def test_nothing_comes_to_stay(tmp_path):
    found = list(measured(STEPS, tmp_path, compiled="COMPILE" in os.environ))
    for each in found[:: max(len(found) // 10, 1)]:
        print(f"step {each.step:,}: {each.bytes / 2**20:.1f} MiB, at most {each.peak / 2**20:.1f}; {each.tensors:,}")
    held = warm(found)
    assert held[-1].step == STEPS - EVERY
    assert len({each.tensors for each in held}) == 1
    if STEPS >= 200:  # fewer points do not make a line
        assert growth(held) <= ALLOWED
    assert all(0 < each.bytes <= each.peak + 2**20 for each in held)
