"""Measure main memory and step times of a run of several processes while it writes checkpoints.

    torchrun --nproc-per-node 4 tests/training/checkpoint_memory.py FOLDER [D_MODEL]

prints one line per process: the bytes of its shards (parameters and two moments), its resident memory before the first
checkpoint and at most after it, and the time of steps before it, and from it to the second one, checkpoint included.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

from seqmix import load_config, train
from seqmix.training.events import Started, Stepped

EVERY = 10
"""Steps between checkpoints."""


def resident() -> int:
    """Bytes of this process in main memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(folder: Path, d_model: int) -> dict[str, float]:
    """A run of two checkpoints."""
    folder.mkdir(exist_ok=True)
    text = folder / f"text-{os.environ['RANK']}.txt"
    text.write_text("a text that is not what is measured. " * 100)
    changes = [f"model.d_model={d_model}", "model.n_layers=8", f"data.paths=[{text}]", "data.sequence_length=16"]
    changes += ["training.batch_size=4", f"training.steps={2 * EVERY + 1}", f"training.checkpoint_every={EVERY}"]
    changes += ["training.evaluate_every=1000", "training.final_evaluation_batches=1", "training.keep_best=false"]
    size, found, peak, ended = int(os.environ["WORLD_SIZE"]), {}, [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], resident())

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    for event in train(load_config("retnet-tiny", changes), folder / "run"):
        match event:
            case Started():
                found |= {"parameters": event.parameters, "own shards": 12 * event.parameters // size}
                found["at most while built"] = peak[0]
            case Stepped() if event.step in (2, EVERY, 2 * EVERY):  # the first step warms up
                seconds, began = time.perf_counter() - began, time.perf_counter()
                if event.step == EVERY:
                    found |= {"at most before": peak[0], "step before": seconds / (EVERY - 2)}
                    peak[0] = 0
                elif event.step > EVERY:
                    found |= {"at most after": peak[0], "step after": seconds / EVERY}
    ended.set()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 768)), flush=True)
