"""What a training step takes on many GPUs, by layout, as arithmetic: memory, traffic and time. Nothing is measured.

With P parameters, R of them outside blocks and E in embedding and output projection, blocks of at most B, L layers, F
operations per token, n = shard x context_parallel pieces, A bytes of activations of a block (`account`), and V logits
at once, bytes and seconds of a GPU are

    memory     16 P / n + 4 (2 B + 2 E) + sequences 4 d_model T L / context_parallel
               + the larger of sequences A / context_parallel and 12 V
    received   (12 P - 4 R) (n - 1) / n, and 8 P / n (data - 1) / data between copies, for every micro-batch
    computing  4 F tokens / (GPUs peak 0.4)
    sending    micro-batches (received / the rate of the link)

with activation checkpointing; without, sequences keep the activations of all blocks beside the logits, and computing
has 3 F; with `matmuls`, they keep the results of linear layers, and the 3 F leave out what is recomputed. What context
parallelism receives is counted in the layers, on meta tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...mixers import SequenceMixer
from ...models import ModelConfig, account, build_meta
from ...models.loss import LOGITS_AT_ONCE
from ...ops.runtime.context_parallel import ContextParallel
from ...registry import SeqmixError
from ..config import RunConfig
from ..monitoring.peak_flops import peak_of

PEAK_FRACTION = 0.4
"""Of the peak, which matrix products are assumed to reach."""
MEMORY_FRACTION = 0.9
"""Of a GPU's memory: the rest is for the context, libraries and fragments."""
GPUS_PER_MACHINE = 8
"""GPUs of a machine."""
BYTES_PER_LOGIT = 3 * 4
"""Bytes of a logit in the loss, of its logarithm of the probability and of its gradient."""


class Gpu(NamedTuple):
    """A kind of GPU: the memory of its data sheet, and rates that are assumed."""

    memory: float
    """Bytes."""
    inside: float
    """Bytes per second that it gets from the others of its machine."""
    between: float
    """Bytes per second that it gets from other machines."""


GPUS = {
    "a100": Gpu(80e9, 200e9, 20e9),
    "h100": Gpu(80e9, 300e9, 40e9),
    "h200": Gpu(141e9, 300e9, 40e9),
    "b200": Gpu(180e9, 600e9, 40e9),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How GPUs share a step, and what that takes of each."""

    data: int
    shard: int
    context_parallel: int
    grad_accum_steps: int
    memory: float
    """Bytes."""
    received: float
    """Bytes per micro-batch: parameters and gradients within a copy, and what segments of a sequence need."""
    copied: float
    """Bytes per micro-batch: gradients, between copies."""
    computing: float
    """Seconds per step."""
    sending: float
    """Seconds per step."""
    fits: bool
    """Whether the memory is there."""

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step: if sending and computing overlap, and if they do not."""
        return max(self.computing, self.sending), self.computing + self.sending

    @property
    def overrides(self) -> list[str]:
        """What sets it on the command line, whatever the configuration says."""
        fields = {"data": self.data, "shard": self.shard, "context_parallel": self.context_parallel}
        distributed = [f"distributed.{name}={size}" for name, size in fields.items()]
        return [*distributed, f"training.grad_accum_steps={self.grad_accum_steps}"]


class Planner:
    """What a run takes on GPUs of one kind.

    Args:
        config: the run.
        gpu: a name of `GPUS`.
    """

    def __init__(self, config: RunConfig, gpu: str = "h100") -> None:
        self.config = config
        self.gpu = GPUS[gpu]
        self.dtype = torch.float32 if config.training.precision == "float32" else torch.bfloat16
        peak = peak_of(gpu.upper(), self.dtype)
        assert peak is not None
        self.rate = PEAK_FRACTION * peak
        self.length = config.data.sequence_length
        self.cost = account(config.model, length=self.length)
        narrow = account(config.model, length=self.length, dtype=self.dtype)
        activations = [layer.activation_bytes for layer in narrow.layers]
        # of two blocks, and of embedding and output projection with their gradients
        largest = max(layer.parameters for layer in self.cost.layers)
        self.width = 2 if config.distributed.gather_dtype == "bfloat16" else 4
        self.gathered = (self.width + 4) * (largest + self.cost.embedding_parameters)
        # the blocks' inputs, and what is inside of the one that is recomputed
        inputs = 4 * config.model.d_model * self.length * len(activations)
        self.again = config.training.activation_checkpointing
        inputs += sum(layer.matmul_bytes for layer in narrow.layers) if self.again == "matmuls" else 0
        self.kept, self.inside = (inputs, max(activations)) if self.again else (sum(activations), 0)
        self.passes = 4 if self.again is True else 3

    def layout(self, *, data: int, shard: int, context_parallel: int = 1, sequences: int) -> Layout:
        """A layout that computes so many sequences at once."""
        pieces = shard * context_parallel
        gpus = data * shard * context_parallel
        settings = self.config.training
        parameters = self.cost.parameters
        parts = settings.batch_size // (data * shard * sequences)
        # parameters, gradients and two moments in pieces; a block is recomputed when the loss has no logits any more
        rows = sequences / context_parallel
        vocab_size = self.config.model.vocab_size
        logits = BYTES_PER_LOGIT * min(rows * self.length * vocab_size, LOGITS_AT_ONCE["cuda"])
        memory = 16 * parameters / pieces + rows * self.kept + max(rows * self.inside, logits)
        # blocks are gathered twice, the rest once, and gradients scattered once; pieces are added up over copies
        rest = parameters - sum(layer.parameters for layer in self.cost.layers)
        width = self.width
        received = (width * (2 * parameters - rest) + 4 * parameters) * (pieces - 1) / pieces
        copied = 2 * 4 * parameters / pieces * (data - 1) / data
        if self.config.distributed.gather_once:  # and once per step, with the whole model and gradients in memory
            received = (width + 4) * parameters * (pieces - 1) / pieces / parts
            copied = copied / parts
        if gpus > 1:
            memory += (width + 4) * parameters if self.config.distributed.gather_once else self.gathered
        tokens = settings.batch_size * self.length
        within = received + sequences * self.segments(context_parallel)
        sending = within / self._link_rate(pieces) + copied / self._link_rate(gpus)
        return Layout(
            data=data,
            shard=shard,
            context_parallel=context_parallel,
            grad_accum_steps=parts,
            memory=memory,
            received=within,
            copied=copied,
            computing=self.passes * self.cost.flops_per_token * tokens / (gpus * self.rate),
            sending=parts * sending,
            fits=memory <= MEMORY_FRACTION * self.gpu.memory,
        )

    def layouts(self, gpus: int) -> list[Layout]:
        """All layouts of so many GPUs, each with the fewest micro-batches that fit: those that fit and are fast first.

        Raises:
            SeqmixError: no layout divides the batch.
        """
        found = [self._best_layout(*sizes) for sizes in self._sizes(gpus)]
        if not found:
            raise SeqmixError(
                f"no layout of {gpus} GPUs divides training.batch_size = {self.config.training.batch_size}: choose a "
                "multiple of the GPUs, or other numbers of both"
            )
        return sorted(found, key=lambda layout: (not layout.fits, layout.seconds[1], layout.memory))

    def segments(self, ranks: int) -> float:
        """Bytes that a GPU receives for a sequence that so many share."""
        if ranks == 1:
            return 0.0
        by_block = {
            name: received(self.config.model, self.length, ranks=ranks, layer=self.config.model.layers.index(name))
            for name in set(self.config.model.layers)
        }
        return sum(by_block[name] for name in self.config.model.layers) * (2 if self.again else 1)

    @cached_property
    def _supports_context_parallel(self) -> bool:
        return all(block.mixer.supports_context_parallel for block in build_meta(self.config.model).blocks)

    def _sizes(self, gpus: int) -> Iterator[tuple[int, int, int]]:
        batch = self.config.training.batch_size
        for context_parallel in (
            _divisors(GPUS_PER_MACHINE) if self._supports_context_parallel and self.length >= GPUS_PER_MACHINE else [1]
        ):
            rest, remains = divmod(gpus, context_parallel)
            for shard in [] if remains else _divisors(rest):
                data = rest // shard
                if batch % (data * shard) == 0:
                    yield data, shard, context_parallel

    def _best_layout(self, data: int, shard: int, context_parallel: int) -> Layout:
        rows = self.config.training.batch_size // (data * shard)
        for sequences in reversed(_divisors(rows)):
            found = self.layout(data=data, shard=shard, context_parallel=context_parallel, sequences=sequences)
            if found.fits or sequences == 1:
                return found
        raise AssertionError("one sequence divides every number of rows")

    def _link_rate(self, gpus: int) -> float:
        return self.gpu.inside if gpus <= GPUS_PER_MACHINE else self.gpu.between


@dataclass(frozen=True)
class _CountingGroup(ContextParallel):
    """A group whose other processes are not there: what they would send is counted."""

    sent: list[int]

    def gather(self, x: Tensor) -> Tensor:
        # what is gathered, and what of it comes back as gradients
        self.sent.append((1 + x.is_floating_point()) * (self.size - 1) * x.nbytes)
        return x.expand(self.size, *x.shape)

    def exchange(
        self,
        sent: Sequence[Tensor],  # noqa: ARG002
        like: Sequence[Tensor],
        distance: int,  # noqa: ARG002
    ) -> tuple[list[Tensor], list[Any]]:
        # forward, and again for backward; this is the last rank, which receives most
        self.sent.append(2 * sum(x.nbytes for x in like))
        return [torch.empty_like(x) for x in like], []


def received(config: ModelConfig, tokens: int, *, ranks: int, layer: int = 0) -> int:
    """Bytes that a layer receives for a sequence of so many tokens that `ranks` share, forward and backward."""
    mixer: SequenceMixer = build_meta(config).blocks[layer].mixer
    mixer.cp_group = group = _CountingGroup("", rank=ranks - 1, size=ranks, sent=[])
    mixer(torch.empty(1, tokens // ranks, config.d_model, device="meta"))
    return sum(group.sent)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
