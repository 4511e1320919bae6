"""Whether a long run takes more and more memory: what the process holds after each of many evaluations.

    python -m seqmix.benchmarks.memory_flat [--steps 2000] [--compile]

A tiny RetNet learns a text by the loop that the command runs, with an evaluation every ten steps and checkpoints behind
every hundred. After a tenth of the steps nothing may grow: a line through what is measured from there on may rise by
`ALLOWED` at most to the end, and exactly as many tensors are alive after every evaluation. Exits with 1 otherwise.
"""

import gc
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer

from ..training import load_config, train
from ..training.events import Evaluated, Saved, Started
from ..training.memory import keep_freed_memory, peak_memory
from .program import run_program

EVERY = 10
"""Steps between evaluations."""
ALLOWED = 2**21
"""Bytes that the process may grow by."""


class Held(NamedTuple):
    """What the process holds after an evaluation."""

    step: int
    bytes: int
    """In main memory now."""
    peak: int
    """The most so far, in bytes."""
    tensors: int
    """Alive, of those that came after the start."""


def measured(steps: int, folder: Path, *, compiled: bool = False) -> Iterator[Held]:
    """Train, and measure after every evaluation, the last one aside, which has more batches."""
    words = np.array(["what", "was", "read", "is", "kept", "and", "written", "again", "by", "others"])
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
                gc.freeze()  # what is there already is not looked at again and again
            while isinstance(event, Saved) and not event.folder.exists():
                time.sleep(0.01)  # the copies that are written are alive until then
            if isinstance(event, Evaluated) and not event.final:
                gc.collect()
                alive = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
                yield Held(event.step, _resident(), peak_memory(torch.device("cpu")) or 0, alive)
    finally:
        gc.unfreeze()


def settled(held: Sequence[Held]) -> list[Held]:
    """What was measured after a tenth of the steps, when caches are full."""
    return [each for each in held if each.step > held[-1].step / 10]


def growth(held: Sequence[Held]) -> float:
    """Bytes by which a line through all measurements rises from the first to the last."""
    steps = [each.step for each in held]
    slope = np.polyfit(steps, [each.bytes for each in held], 1)[0]
    return float(slope * (steps[-1] - steps[0]))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(
    steps: Annotated[int, typer.Option(min=200)] = 2000,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile the blocks.")] = False,
) -> None:
    """Measure, and print a table."""
    torch.set_num_threads(1)
    keep_freed_memory()
    with TemporaryDirectory() as folder:
        held = list(measured(steps, Path(folder), compiled=compiled))
    print("| step | memory | peak | tensors |\n|---|---|---|---|")
    for each in held[:: max(len(held) // 10, 1)]:
        print(f"| {each.step:,} | {each.bytes / 2**20:.1f} MiB | {each.peak / 2**20:.1f} MiB | {each.tensors:,} |")
    rest = settled(held)
    grown, tensors = growth(rest), {each.tensors for each in rest}
    print(f"\nFrom step {rest[0].step:,} to {rest[-1].step:,}: {grown / 1024:+.0f} KiB, {len(rest)} evaluations.")
    if grown > ALLOWED or len(tensors) > 1:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_program(main)
