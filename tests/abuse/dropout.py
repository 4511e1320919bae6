"""Dropout on one, two and four processes, in any micro-batches: the same weights as on one process in one batch."""

import atexit
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import rank_processes as on_ranks
import torch
from abuse.tally import Case
from rank_processes import Ranks

from seqmix import load_run

DROPOUT = ("model.dropout=0.2", "model.blocks.ret.dropout=0.1", "model.blocks.attn.dropout=0.1")
PLAIN = "training.optimizer=torch.optim:SGD"
"""What moves weights in proportion to their gradients: rounding stays rounding."""
MODELS = {
    "both mixers": (),
    "packed documents": ("data.packing=true",),
    "a carried state": ("training.carry_state=true", "model.pattern=[ret]"),
    "recomputed": ("training.activation_checkpointing=true",),
    "an odd length": ("data.sequence_length=17",),
}
LAYOUTS = {
    "micro-batches": (1, "training.grad_accum_steps=4"),
    "one row each": (1, "training.grad_accum_steps=8"),
    "two processes": (2,),
    "two shards": (2, "distributed.shard=2", "training.grad_accum_steps=2"),
    "context parallelism": (2, "distributed.context_parallel=2"),
    "four processes": (4,),
    "shards and data": (4, "distributed.shard=2", "distributed.data=2"),
    "shards and context": (4, "distributed.shard=2", "distributed.context_parallel=2"),
}
TOLERANCE = 1e-5


def dropout(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Every layout of every model."""
    (text := folder / "text.txt").write_text("a text of several sentences, over and over again; " * 60)
    pools: dict[int, Ranks] = {}
    for model, changes in MODELS.items():
        settings = [f"data.paths=[{text}]", *DROPOUT, PLAIN, *changes]
        for name, (size, *layout) in LAYOUTS.items():
            action = partial(_same, folder, pools, settings, model, name, size, layout)
            yield Case(f"{model}, {name}", action, refused=False)


def _weights(run: Path) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in load_run(run).parameters()])


def _same(
    folder: Path, pools: dict[int, Ranks], settings: list[str], model: str, name: str, size: int, layout: list[str]
) -> None:
    if not (alone := folder / model).exists():
        on_ranks.train_here(settings, str(alone))
    run = folder / f"{model}, {name}"
    if size == 1:
        on_ranks.train_here([*settings, *layout], str(run))
    else:
        if size not in pools:
            pools[size] = Ranks(size)
            atexit.register(pools[size].close)
        pools[size]("train_here", [*settings, *layout], str(run))
    one, other = _weights(alone), _weights(run)
    difference = (one - other).norm() / one.norm()
    assert difference < TOLERANCE, f"weights differ by {difference:.2g}"
