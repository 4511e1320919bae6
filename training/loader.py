"""This process's rows of training batches, read one step ahead by a thread where a GPU computes.

They wait in pinned memory, from which a GPU copies while the host goes on. On a CPU there is no thread: it would share
the cores, and reading takes a two-hundredth of a step at most (measured on text and on recall, 0.9M parameters).
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import torch

from ..data import Batch, Source
from .config import RunConfig
from .distributed.process_groups import ALONE, ProcessGroups

_Read: TypeAlias = tuple[Batch, dict[str, Any] | None]
"""A batch, and what a checkpoint after its step holds of the data."""


class Loader:
    """Reads the batches of a run's steps. An error of the next step's data is raised when that step asks for it."""

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        device: torch.device,
        groups: ProcessGroups = ALONE,
        *,
        ahead: bool | None = None,
    ) -> None:
        self.config = config
        self.source = source
        self.device = device
        self.groups = groups
        ahead = device.type == "cuda" if ahead is None else ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if ahead else None
        self._reads: dict[int, Future[_Read]] = {}
        """The step that was asked for last, and the next one."""

    def batch(self, step: int) -> Batch:
        """The rows of a step's batch, on the model's device; SeqmixError: the data cannot be read."""
        if self._thread is None:
            return self._read(step)[0]
        asked = [each for each in (step, step + 1) if each == step or each < self.config.training.steps]
        self._reads = {each: self._reads.get(each) or self._thread.submit(self._read, each) for each in asked}
        batch, _ = self._reads[step].result()
        return Batch(*(part.to(self.device, non_blocking=True) for part in batch))

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint holds of the data, after the last step that was asked for, whatever was read ahead."""
        return self._reads[min(self._reads)].result()[1] if self._reads else self.source.state_dict()

    def _read(self, step: int) -> _Read:
        size = self.config.training.batch_size
        groups = self.groups
        batch = self.source.training_batch(step, size, self.config.seed, groups.dp_rank, groups.dp_size)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):  # a new thread has the first one
                batch = Batch(*(part.pin_memory() for part in batch))
        return batch, self.source.state_dict()
