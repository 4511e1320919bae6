"""The processes that train one run, as `torchrun` starts them; a single process needs no process group.

A data-parallel rank reads its own sequences, which the ranks of its context-parallel group share: process p is rank
p % context_parallel of that group.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...ops.runtime.context_parallel import ContextParallel
from ...registry import ElsewhereError, SeqmixError
from ..config import DistributedConfig


@dataclass(frozen=True, eq=False)
class ProcessGroups:
    """This process's place among all processes."""

    rank: int = 0
    """Rank of this process, from 0."""
    size: int = 1
    """World size: data x shard x context_parallel."""
    data: int = 1
    shard: int = 1
    context_parallel: int = 1
    cp_group: ContextParallel | None = None
    """The context-parallel group of this process; None without context parallelism."""
    group: Any = None
    """The torch group of `sum` and `gather`; None for the default one."""
    background_group: Any = None
    patience: timedelta | None = None
    """How long this process waits for another one."""

    @property
    def background(self) -> "ProcessGroups":
        """The same processes, for collective calls of another thread."""
        return replace(self, group=self.background_group)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs (rank 0)."""
        return self.rank == 0

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks, over which a batch is divided."""
        return self.data * self.shard

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank of this process."""
        return self.rank // self.context_parallel

    @property
    def replica(self) -> int:
        """The number of this process's replica of the model."""
        return self.rank // (self.size // self.data)

    @cached_property
    def mesh(self) -> Any:
        """The device mesh of FSDP: replicas of the model in the first dimension, if there are several."""
        from torch.distributed.device_mesh import init_device_mesh

        copies = {"data": self.data} if self.data > 1 else {}
        sizes = {**copies, "shard": self.shard * self.context_parallel}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        mesh: Any = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        if copies and self.patience is not None:
            for group in mesh.get_all_groups():  # torch has no argument for it
                dist.distributed_c10d._set_pg_timeout(self.patience, group)
        return mesh

    def sum(self, value: Tensor) -> Tensor:
        """All-reduce: the sum over all processes."""
        if self.size > 1:
            value = value.detach().clone()
            dist.all_reduce(value, group=self.group)
        return value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag))).item())

    def gather(self, value: Any) -> list[Any]:
        """All-gather: the value of each process, in rank order; any JSON value."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(text)]), group=self.group)
        longest = max(int(length) for length in lengths)
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
        dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - len(text))), group=self.group)
        return [json.loads(bytes(t[: int(n)].tolist())) for t, n in zip(texts, lengths, strict=True)]

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
            raise ElsewhereError(f"process {first} of {self.size} failed: {reasons[first]}")


ALONE = ProcessGroups()
"""A single process."""


@contextmanager
def join_processes(config: DistributedConfig) -> Iterator[ProcessGroups]:
    """Join the process group that torchrun describes, or the one already initialized.

    SeqmixError: the configured layout needs another number of processes, or a process is lost.
    """
    size = _number("WORLD_SIZE", "1")
    rank = _number("RANK", "0")
    if dist.is_available() and dist.is_initialized():
        size = dist.get_world_size()
        rank = dist.get_rank()
    shard = _shards(config, size)
    cp_size = config.context_parallel
    if size == 1:
        yield ALONE
        return
    ours = not dist.is_initialized()
    patience = timedelta(seconds=config.timeout)
    if ours:
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(_number("LOCAL_RANK", "0"))
        try:
            torchs: Any = dist  # whose stubs lack two names
            store, rank, size = next(torchs.rendezvous("env://"))
            # after a restart by torchrun, the store still has what processes of the attempt before have written
            store = torchs.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        except (ValueError, dist.DistError) as error:
            raise SeqmixError(
                f"WORLD_SIZE is {size}, and the processes cannot meet: {str(error).splitlines()[0]}; torchrun sets all "
                "that they need"
            ) from error
    cp_group = None
    for first in range(0, size, cp_size) if cp_size > 1 else ():
        # every process must take part in creating every group
        group: Any = dist.new_group(list(range(first, first + cp_size)), timeout=patience)
        if first <= rank < first + cp_size:
            cp_group = ContextParallel.of(group)
    try:
        everyone = dist.new_group(backend="gloo", timeout=patience)
        yield ProcessGroups(rank, size, config.data, shard, cp_size, cp_group, None, everyone, patience)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            when = "".join(getattr(error, "__notes__", ()))  # as the course of a run has it
            what = "waited in vain for" if "timed out" in str(error).lower() else "lost the connection to"
            # a lost process says nothing; one of the first two is there to say it
            raise (SeqmixError if rank < 2 else ElsewhereError)(
                f"{when}{what} another process of the run, which ends: --resume continues from a checkpoint"
            ) from error
        raise
    # not after an error: it would wait for processes that are gone
    if ours:
        dist.destroy_process_group()


def require_alone(what: str) -> None:
    """Refuse to do what one process does, where torchrun has started several.

    Raises:
        SeqmixError: it has.
    """
    if (size := _number("WORLD_SIZE", "1")) > 1:
        raise SeqmixError(f"{what} runs in one process, and WORLD_SIZE is {size}: start it without torchrun")


def _number(name: str, default: str) -> int:
    """A number that torchrun sets."""
    if not (given := os.environ.get(name, default)).isdecimal():
        raise SeqmixError(f"{name} is {given!r} in the environment, and must be a number, which torchrun sets")
    return int(given)


def _shards(config: DistributedConfig, size: int) -> int:
    """Processes that parameters are sharded over, without context parallelism."""
    others = config.data * config.context_parallel
    shard = config.shard or max(size // others, 1)
    if others * shard == size:
        return shard
    asked = others * (config.shard or 1)
    layout = f"{config.data} x {'any' if config.shard is None else config.shard} x {config.context_parallel}"
    number = f"a multiple of {others}" if config.shard is None else str(asked)
    raise SeqmixError(
        f"distributed: data x shard x context_parallel = {layout} needs {number} processes, and there are {size}: "
        f"use `torchrun --nproc-per-node {asked} -m seqmix train ...`, or change `distributed`"
    )
