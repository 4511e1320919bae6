"""Measure main memory and step times of a multi-process run while it writes checkpoints.

    torchrun --nproc-per-node 4 tests/training/checkpoint_memory.py FOLDER [PRESET [CHANGE ...]]

trains retnet-200m on bytes (202M parameters), one sequence of 1,024 per process, and prints the peak memory of every
process in MiB: while the model is built, in a step (its parameter shards and everything the step allocates), and while
a checkpoint is written (the increase). Then it checks for all processes:

- their initial weights are bitwise those of a single process;
- none ever holds as much memory as all parameters of the model take;
- none needs more for a checkpoint than its shards (parameters and two moments) plus 1 GiB;
- the median step is at most a tenth slower while a checkpoint is written, if cores are free.
"""

import ctypes
import os
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
import rank_processes
from recorded_operations import Live

from seqmix import load_config, train
from seqmix.training.config import DistributedConfig
from seqmix.training.distributed.process_groups import join_processes
from seqmix.training.distributed.sharding import local_tensor
from seqmix.training.monitoring.events import Saved, Stepped
from seqmix.training.trainer import Trainer

PRESET = ("retnet-200m", "model.vocab_size=257", "training.grad_accum_steps=1")
EVERY = 3
"""Steps between checkpoints. Memory is measured until the first is written, which slows steps, and times after it."""
STEPS = 4 * EVERY
TOKENS = 1024
"""Of a sequence, one for each process: few beside those of a real step, which a checkpoint slows less."""
MIB = 2**20
SLOWED = "step while one is written"
TIMES = ("step", SLOWED, "copy")


def resident(*, trim: bool = False) -> int:
    """Bytes of this process in main memory; with `trim`, without what the allocator keeps of freed memory."""
    if trim:
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure(folder: Path, asked: list[str]) -> dict[str, float]:
    """A run of several checkpoints."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    text = folder / f"text-{rank}.txt"
    text.write_text("a text that is not what is measured. " * 4000)
    preset, *changes = asked or PRESET
    changes += [f"data.paths=[{text}]", f"data.sequence_length={TOKENS}", f"training.batch_size={size}"]
    changes += [f"training.steps={STEPS}", f"training.checkpoint_every={EVERY}", "training.compile=false"]
    # an evaluation before every checkpoint, as presets have it: none has to find whether parameters are finite
    changes += [f"training.evaluate_every={EVERY}", "training.evaluation_batches=1", "training.keep_best=false"]
    changes += ["training.final_evaluation_batches=1"]
    changes += ["training.keep_checkpoints=1", "training.warmup_steps=1", "training.activation_checkpointing=true"]
    same, built, shards, whole = rank_processes.started_here(changes, preset)
    found = {"rank": rank, "same": same, "whole": whole, "shards": shards, "built": built}
    at_most, ended, step = [0], threading.Event(), Trainer.train_step
    times: dict[str, list[float]] = {name: [] for name in TIMES}
    written, level, more = None, 0, list[int]()

    def watch() -> None:
        while not ended.wait(0.005):
            at_most[0] = max(at_most[0], resident())

    def counted(trainer: Trainer, number: int):
        if number != 1:
            return step(trainer, number)
        with Live() as live:
            result = step(trainer, number)
        parameters = sum(local_tensor(p).nbytes for p in trainer.model.parameters())
        found["in a step"] = parameters + live.added
        return result

    Trainer.train_step = counted
    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    for event in train(load_config(preset, changes), folder / "run"):
        seconds = time.perf_counter() - began
        if isinstance(event, Stepped) and event.step > EVERY + 2:
            times["step" if written is None else SLOWED].append(seconds)
        if isinstance(event, Stepped) and event.step == EVERY:
            level = at_most[0] = resident(trim=True)
        if isinstance(event, Saved):
            written = event.folder
            times["copy"] += [seconds] if EVERY < event.step < STEPS else []  # the last one is waited for
        if written is not None and written.exists():
            more += [] if ended.is_set() else [at_most[0] - level]
            written = None
            ended.set()
        began = time.perf_counter()
    times[SLOWED] = times[SLOWED] or times["step"]  # it takes less than a step
    return found | {"saving": max(more)} | {name: statistics.median(each) for name, each in times.items()}


def main(folder: Path, asked: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with join_processes(DistributedConfig()) as groups:
        found = groups.gather(measure(folder, asked))
        if not groups.is_main:
            return
    shutil.rmtree(folder)
    for each in found:
        sizes = {name: f"{each[name] / MIB:,.0f}" for name in ("whole", "shards", "built", "in a step", "saving")}
        print(f"process {each['rank'] + 1}: MiB {sizes}, seconds { {name: round(each[name], 3) for name in TIMES} }")
        lost = (each["copy"] + each[SLOWED] - each["step"]) / each["step"]
        print(f"  a checkpoint takes the time of {lost:.1f} steps")
    own = [3 * each["shards"] for each in found]
    held = {
        "start-up weights are those of one process": [each["same"] for each in found],
        "less than the whole model while it is built": [each["built"] < each["whole"] for each in found],
        "less than the whole model in a step": [each["in a step"] < each["whole"] for each in found],
        "at most own shards and 1 GiB for a checkpoint": [
            each["saving"] <= mine + 2**30 for each, mine in zip(found, own, strict=True)
        ],
        "steps at most a tenth slower while one is written": [each[SLOWED] <= 1.1 * each["step"] for each in found],
    }
    for what, each in held.items():
        print(f"{what}: {sum(each)} of {len(each)} processes")
    print(f"{os.cpu_count()} cores, {os.getloadavg()[0]:.1f} busy at the end, torch {torch.__version__}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
