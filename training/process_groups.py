"""The processes that train one run together, as `torchrun` starts them; one alone is the same with nobody to ask.

A data-parallel rank reads sequences of its own, which the ranks of its context-parallel group share: process p has the
place p % context_parallel in it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.context_parallel import ContextParallel
from ..registry import ElsewhereError, SeqmixError
from .config import DistributedConfig


@dataclass(frozen=True, eq=False)
class ProcessGroups:
    """This process and the others."""

    rank: int = 0
    """This process, from 0."""
    size: int = 1
    """All processes: data x shard x context_parallel."""
    data: int = 1
    shard: int = 1
    context_parallel: int = 1
    cp_group: ContextParallel | None = None
    """The processes that share this one's sequences; None where it has them for itself."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    @property
    def dp_size(self) -> int:
        """Shares that a batch is read in."""
        return self.data * self.shard

    @property
    def dp_rank(self) -> int:
        """Which of them is this process's."""
        return self.rank // self.context_parallel

    @cached_property
    def mesh(self) -> Any:
        """Over which parameters are sharded: copies of the model in the first dimension, where there are several."""
        from torch.distributed.device_mesh import init_device_mesh

        copies = {"data": self.data} if self.data > 1 else {}
        sizes = {**copies, "shard": self.shard * self.context_parallel}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, the same on each."""
        if self.size > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag))).item())

    def gather(self, value: Any) -> list[Any]:
        """A value of each process, in order; anything that JSON holds."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(text)]))
        longest = max(int(length) for length in lengths)
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
        dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))))
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, lengths, strict=True)]

    def gather_rows(self, leaf: Tensor) -> Tensor:
        """The rows of the whole batch, from each data-parallel rank's own."""
        if self.size == 1:
            return leaf
        parts = [torch.empty_like(leaf) for _ in range(self.size)]
        dist.all_gather(parts, leaf.contiguous())
        return torch.cat(parts[:: self.context_parallel])

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """Raise on every process what fails on one: the first that fails says why, the others that it has failed."""
        failed: SeqmixError | None = None
        try:
            yield
        except SeqmixError as error:
            failed = error
        reasons = self.gather(None if failed is None else str(failed))
        first = next((rank for rank, reason in enumerate(reasons) if reason is not None), None)
        if failed is not None and first == self.rank:
            raise failed
        if first is not None:
            raise ElsewhereError(f"process {first} of {self.size} has failed: {reasons[first]}")


ALONE = ProcessGroups()
"""One process."""


@contextmanager
def join_processes(config: DistributedConfig) -> Iterator[ProcessGroups]:
    """Join the other processes in the group that torchrun describes, or in the one there is already.

    SeqmixError: the configured layout is of another number. ElsewhereError: the connection to another one is lost.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if dist.is_available() and dist.is_initialized():
        size, rank = dist.get_world_size(), dist.get_rank()
    shard, cp_size = _shards(config, size), config.context_parallel
    if size == 1:
        yield ALONE
        return
    ours = not dist.is_initialized()
    if ours:
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    cp_group = None
    for first in range(0, size, cp_size) if cp_size > 1 else ():
        # every process takes part in making every group
        group: Any = dist.new_group(list(range(first, first + cp_size)))
        if first <= rank < first + cp_size:
            cp_group = ContextParallel.of(group)
    try:
        yield ProcessGroups(rank, size, config.data, shard, cp_size, cp_group)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ElsewhereError("another process of the run is gone") from error
        raise
    # not after an error: others may be gone, and would be waited for
    if ours:
        dist.destroy_process_group()


def _shards(config: DistributedConfig, size: int) -> int:
    """Processes that parameters are sharded over, context parallelism aside."""
    others = config.data * config.context_parallel
    shard = config.shard or max(size // others, 1)
    if others * shard == size:
        return shard
    asked = others * (config.shard or 1)
    layout = f"{config.data} x {'any' if config.shard is None else config.shard} x {config.context_parallel}"
    number = f"a multiple of {others}" if config.shard is None else str(asked)
    raise SeqmixError(
        f"distributed lays out data x shard x context_parallel = {layout} processes, {number}, and there "
        f"{'is one' if size == 1 else f'are {size}'}: start as many with "
        f"`torchrun --nproc-per-node {asked} -m seqmix train ...`, or change `distributed`"
    )
