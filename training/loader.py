"""Loader of this process's rows of training batches. For a GPU, a thread reads one step ahead.

The rows wait in pinned memory, from which the GPU copies asynchronously. A CPU needs no thread: it would compete for
the cores, and reading takes at most 1/200 of a step (measured on text and on recall, 0.9M parameters).
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import torch

from ..data import Batch, Source
from .config import RunConfig
from .distributed.process_groups import ALONE, ProcessGroups

_Read: TypeAlias = tuple[Batch, dict[str, Any] | None]
"""The batch of a step, and the data's state after this step, for a checkpoint."""


class Loader:
    """Reader of the batches of a run. An error while reading ahead is raised when the step asks for its batch.

    Args:
        config: the run.
        source: the data.
        device: device of the batches.
        groups: the processes of the run.
        reads_ahead: True to read one step ahead in a thread; None to do so only if the device is a GPU.
    """

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        device: torch.device,
        groups: ProcessGroups = ALONE,
        *,
        reads_ahead: bool | None = None,
    ) -> None:
        self.config = config
        self.source = source
        self.device = device
        self.groups = groups
        reads_ahead = device.type == "cuda" if reads_ahead is None else reads_ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches") if reads_ahead else None
        self._reads: dict[int, Future[_Read]] = {}
        """Pending reads by step: the step requested last, and the next one."""

    def batch(self, step: int) -> Batch:
        """Return this process's rows of a step's batch, on the device.

        Raises:
            SeqmixError: the data cannot be read.
        """
        if self._thread is None:
            return self._read(step)[0]
        steps = [each for each in (step, step + 1) if each == step or each < self.config.training.steps]
        self._reads = {each: self._reads.get(each) or self._thread.submit(self._read, each) for each in steps}
        batch, _ = self._reads[step].result()
        return Batch(*(part.to(self.device, non_blocking=True) for part in batch))

    def state_dict(self) -> dict[str, Any] | None:
        """Return the data's state for a checkpoint: after the last requested step, even if more was read ahead."""
        return self._reads[min(self._reads)].result()[1] if self._reads else self.source.state_dict()

    def _read(self, step: int) -> _Read:
        size = self.config.training.batch_size
        groups = self.groups
        batch = self.source.training_batch(step, size, self.config.seed, groups.dp_rank, groups.dp_size)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):  # a new thread starts on GPU 0
                batch = Batch(*(part.pin_memory() for part in batch))
        return batch, self.source.state_dict()
