"""Process groups of a run that `torchrun` starts; a single process needs none.

Each data-parallel rank reads its own sequences. A data-parallel rank is a context-parallel group of processes that
share the sequences: process p is rank p % context_parallel of the group of data-parallel rank p // context_parallel.
"""

import json
import os
import re
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


class LostProcessError(SeqmixError):
    """Another process of the run has died, or does not answer."""

    exit_status = 6


class SilentLostProcessError(LostProcessError, ElsewhereError):
    """Another process is lost, which a third one reports."""


@dataclass(frozen=True, eq=False)
class ProcessGroups:
    """The position of this process in the layout of all processes, and the collective calls among them."""

    rank: int = 0
    """Rank of this process, from 0."""
    size: int = 1
    """World size: data x shard x context_parallel."""
    data: int = 1
    """Number of replicas of the model."""
    shard: int = 1
    """Number of processes that a replica's parameters are sharded over, besides context parallelism."""
    context_parallel: int = 1
    """Number of processes that share each sequence."""
    cp_group: ContextParallel | None = None
    """Context-parallel group of this process; None without context parallelism."""
    group: Any = None
    """Torch process group of `sum` and `gather`; None for the default one."""
    background_group: Any = None
    """Torch process group for the collective calls of another thread."""
    timeout: timedelta | None = None
    """Time to wait for another process before an error; None for torch's default."""

    @property
    def background(self) -> "ProcessGroups":
        """Copy of this object whose collective calls another thread may use at the same time."""
        return replace(self, group=self.background_group)

    @property
    def is_main(self) -> bool:
        """True for the process that writes files and logs (rank 0)."""
        return self.rank == 0

    @property
    def dp_size(self) -> int:
        """Number of data-parallel ranks, over which a batch is divided."""
        return self.data * self.shard

    @property
    def dp_rank(self) -> int:
        """Data-parallel rank of this process."""
        return self.rank // self.context_parallel

    @property
    def replica(self) -> int:
        """Index of this process's replica of the model, from 0."""
        return self.rank // (self.size // self.data)

    @cached_property
    def mesh(self) -> Any:
        """Device mesh of FSDP; with several replicas of the model, they are its first dimension."""
        from torch.distributed.device_mesh import init_device_mesh

        replicas = {"data": self.data} if self.data > 1 else {}
        sizes = {**replicas, "shard": self.shard * self.context_parallel}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        mesh: Any = init_device_mesh(device, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        if replicas and self.timeout is not None:
            for group in mesh.get_all_groups():  # init_device_mesh has no argument for the timeout
                dist.distributed_c10d._set_pg_timeout(self.timeout, group)
        return mesh

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over all processes (all-reduce)."""
        if self.size > 1:
            value = value.detach().clone()
            dist.all_reduce(value, group=self.group)
        return value

    def any(self, flag: bool) -> bool:
        """Return True if the flag is set on any process."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag))).item())

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes in rank order (all-gather); values are JSON types."""
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
        """Context that makes an error of one process fail all of them.

        The first process that fails raises its own error, all others an `ElsewhereError`.
        """
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
"""The only process of a run: its collective calls return their arguments."""


@contextmanager
def join_processes(config: DistributedConfig) -> Iterator[ProcessGroups]:
    """Context in which this process is part of torchrun's process group, or of one that is already initialized.

    Raises:
        SeqmixError: the configured layout needs another number of processes, the processes cannot connect, or one is
            lost.
    """
    size = _read_number("WORLD_SIZE", "1")
    rank = _read_number("RANK", "0")
    if dist.is_available() and dist.is_initialized():
        size = dist.get_world_size()
        rank = dist.get_rank()
    shard = _shard_size(config, size)
    cp_size = config.context_parallel
    if size == 1:
        yield ALONE
        return
    initialized_here = not dist.is_initialized()
    timeout = timedelta(seconds=config.timeout)
    if initialized_here:
        gpu = torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(_read_number("LOCAL_RANK", "0"))
        try:
            untyped_dist: Any = dist  # torch's stubs lack two names
            store, rank, size = next(untyped_dist.rendezvous("env://"))
            # after a restart by torchrun, the store still has the keys of the previous attempt
            store = untyped_dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        except (ValueError, dist.DistError) as error:
            raise SeqmixError(
                f"the {size} processes (WORLD_SIZE) cannot connect: {str(error).splitlines()[0]}; start them with "
                "torchrun, which sets the addresses that they need"
            ) from error
    cp_group = None
    for first in range(0, size, cp_size) if cp_size > 1 else ():
        # every process must take part in creating every group
        group: Any = dist.new_group(list(range(first, first + cp_size)), timeout=timeout)
        if first <= rank < first + cp_size:
            cp_group = ContextParallel.of(group)
    with explain_lost_process(rank):
        everyone = dist.new_group(backend="gloo", timeout=timeout)
        yield ProcessGroups(rank, size, config.data, shard, cp_size, cp_group, None, everyone, timeout)
    # not after an error, as it would wait for processes that have ended
    if initialized_here:
        dist.destroy_process_group()


@contextmanager
def explain_lost_process(rank: int) -> Iterator[None]:
    """Context that turns the failure of a collective call into a LostProcessError; `rank` is that of this process."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error)
        if not isinstance(error, dist.DistError) and "gloo" not in reason:
            raise
        step = "".join(getattr(error, "__notes__", ()))  # "step 5: ", added by `TrainingLoop.steps`
        problem = "timed out waiting for" if "timed out" in reason.lower() else "lost the connection to"
        peer = re.search(r"peer \[(.+?)\]:\d+", reason)
        address = f" on {peer[1]}" if peer else ""
        # ranks 0 and 1 report it, as the lost process may be one of them
        raise (LostProcessError if rank < 2 else SilentLostProcessError)(
            f"{step}{problem} another process of the run{address}, so this one ended too: continue from the newest "
            "checkpoint with --resume"
        ) from error


def require_alone(what: str) -> None:
    """Check that torchrun did not start several processes, for a task that runs in one process.

    Args:
        what: the task, for the message.

    Raises:
        SeqmixError: there are several processes.
    """
    if (size := _read_number("WORLD_SIZE", "1")) > 1:
        raise SeqmixError(f"{what} runs in one process, got WORLD_SIZE = {size}: start it without torchrun")


def _read_number(name: str, default: str) -> int:
    """Return a number from an environment variable that torchrun sets."""
    if not (value := os.environ.get(name, default)).isdecimal():
        raise SeqmixError(
            f"expected the environment variable {name} to be a number, as torchrun sets it, got {value!r}"
        )
    return int(value)


def _shard_size(config: DistributedConfig, size: int) -> int:
    """Return the number of processes for `distributed.shard`; SeqmixError if the layout needs another world size."""
    others = config.data * config.context_parallel
    shard = config.shard or max(size // others, 1)
    if others * shard == size:
        return shard
    needed = others * (config.shard or 1)
    layout = f"{config.data} x {'any' if config.shard is None else config.shard} x {config.context_parallel}"
    number = f"a multiple of {others}" if config.shard is None else str(needed)
    raise SeqmixError(
        f"distributed: data x shard x context_parallel = {layout} needs {number} processes, got {size}: "
        f"use `torchrun --nproc-per-node {needed} -m seqmix train ...`, or change `distributed`"
    )
