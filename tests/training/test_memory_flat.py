"""Memory does not grow with the steps of a run.

    STEPS=2000 pytest -s tests/training/test_memory_flat.py

The command's training loop trains a tiny RetNet, with an evaluation every 10 steps and a checkpoint every 100.
After the first tenth of the steps, a line fitted to the measurements may rise by at most `ALLOWED`, and the number of
live tensors must be the same after every evaluation. COMPILE=1 compiles blocks.
"""

import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from seqmix.training import load_config, train
from seqmix.training.monitoring.events import Evaluated, Saved, Started

STEPS = int(os.environ.get("STEPS", "60"))
EVERY = 10  # steps between evaluations
ALLOWED = 2**21  # bytes that the process may grow by


def measured(folder: Path) -> Iterator[tuple[int, int, int]]:
    """Train; after every evaluation but the last: the step, bytes, and tensors that came after the start."""
    words = np.array(["what", "was", "read", "is", "saved", "and", "written", "again", "by", "others"])
    (folder / "text.txt").write_text(" ".join(np.random.default_rng(0).choice(words, 10_000)))
    compiled = str("COMPILE" in os.environ).lower()
    changes = [
        *("model.d_model=32", "model.n_layers=2", "model.dropout=0.1", "data.sequence_length=64"),
        *(f"data.paths=[{folder / 'text.txt'}]", f"training.steps={STEPS}", "training.batch_size=4"),
        *(f"training.evaluate_every={EVERY}", "training.evaluation_batches=4", "training.checkpoint_every=100"),
        *("training.warmup_steps=10", "training.log_every=1", f"training.compile={compiled}"),
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
                yield event.step, resident, alive
    finally:
        gc.unfreeze()


def test_memory_and_live_tensors_do_not_grow_with_steps(tmp_path):
    found = list(measured(tmp_path))
    for step, size, tensors in found[:: max(len(found) // 10, 1)]:
        print(f"step {step:,}: {size / 2**20:.1f} MiB; {tensors:,}")
    # after a tenth of the steps, when caches are full
    steps, sizes, alive = zip(*(each for each in found if each[0] > STEPS / 10), strict=True)
    assert steps[-1] == STEPS - EVERY
    assert len(set(alive)) == 1
    if STEPS >= 200:  # fewer points do not make a line
        assert np.polyfit(steps, sizes, 1)[0] * (steps[-1] - steps[0]) <= ALLOWED
