"""Estimates of a training step on many GPUs, by layout: memory, traffic and time. They are computed, not measured.

Notation: P parameters, of which R are outside of blocks, E in embedding and output projection, and at most B in one
block; L layers; T tokens in a sequence; `sequences` in a micro-batch of one data-parallel rank; `tokens` in a batch;
F operations per token; n = shard x context_parallel shards of a replica; A bytes of activations per block and sequence
(`account`); V logits in memory at once; `peak` operations per second. Then each GPU takes, in bytes and seconds,

    memory     16 P / n + 4 (2 B + 2 E) + sequences 4 d_model T L / context_parallel
               + the larger of sequences A / context_parallel and 12 V
    received   (12 P - 4 R) (n - 1) / n, and 8 P / n (data - 1) / data between replicas, for every micro-batch
    computing  4 F tokens / (GPUs peak 0.4)
    sending    micro-batches (received / the rate of the link)

with activation checkpointing. Without it, the activations of all blocks stay in memory beside the logits, and computing
has 3 F instead of 4 F. With `matmuls`, the results of linear layers stay in memory too; computing has 3 F, which does
not count the recomputation. The traffic of context parallelism is counted by running the layers on meta tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...mixers import SequenceMixer
from ...mixers.base.context_parallel import require_sequential
from ...mixers.base.state import to_dict
from ...models import ModelConfig, account, build_meta
from ...models.loss import LOGITS_AT_ONCE
from ...ops.runtime.context_parallel import ContextParallel
from ...registry import SeqmixError
from ..config import RunConfig
from ..monitoring.peak_flops import peak_of

PEAK_FRACTION = 0.4
"""Assumed fraction of the GPU's peak rate that a step reaches."""
MEMORY_FRACTION = 0.9
"""Usable fraction of a GPU's memory; the rest is for the CUDA context, libraries and fragmentation."""
GPUS_PER_MACHINE = 8
"""Assumed number of GPUs in a machine."""
BYTES_PER_LOGIT = 3 * 4
"""Bytes per logit in the loss: the logit, its log-probability and its gradient, in float32."""


class Gpu(NamedTuple):
    """A kind of GPU: its memory according to the data sheet, and assumed transfer rates."""

    memory: float
    """Memory of the GPU, in bytes."""
    rate_within_machine: float
    """Bytes per second that the GPU receives from GPUs of the same machine."""
    rate_between_machines: float
    """Bytes per second that the GPU receives from other machines."""


GPUS = {
    "a100": Gpu(80e9, 200e9, 20e9),
    "h100": Gpu(80e9, 300e9, 40e9),
    "h200": Gpu(141e9, 300e9, 40e9),
    "b200": Gpu(180e9, 600e9, 40e9),
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A division of a training step over GPUs, with the cost for each GPU."""

    data: int
    """Number of replicas of the model."""
    shard: int
    """Number of GPUs that a replica's parameters are sharded over, besides context parallelism."""
    context_parallel: int
    """Number of GPUs that share each sequence."""
    grad_accum_steps: int
    """Number of micro-batches per step."""
    memory: float
    """Memory that each GPU needs, in bytes."""
    received: float
    """Bytes received per micro-batch within a replica: parameters, gradients and the traffic of context parallelism."""
    copied: float
    """Bytes received per micro-batch from other replicas: gradients."""
    computing: float
    """Seconds of computation per step."""
    sending: float
    """Seconds of communication per step."""
    fits: bool
    """True if a GPU has enough memory."""

    @property
    def seconds(self) -> tuple[float, float]:
        """Two estimates of the seconds per step: communication and computation overlap, or they do not."""
        return max(self.computing, self.sending), self.computing + self.sending

    @property
    def overrides(self) -> list[str]:
        """Configuration overrides (key=value) that set this layout on the command line."""
        fields = {"data": self.data, "shard": self.shard, "context_parallel": self.context_parallel}
        distributed = [f"distributed.{name}={size}" for name, size in fields.items()]
        return [*distributed, f"training.grad_accum_steps={self.grad_accum_steps}"]


class Planner:
    """Planner of layouts: estimates the cost of a run's training step on GPUs of one kind.

    Args:
        config: the run.
        gpu: a key of `GPUS`.
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
        # gathered parameters and gradients of the largest block, and of embedding and output projection
        largest = max(layer.parameters for layer in self.cost.layers)
        self.bytes_per_gathered = 2 if config.distributed.gather_dtype == "bfloat16" else 4
        self.gathered_bytes = (self.bytes_per_gathered + 4) * (largest + self.cost.embedding_parameters)
        # stored: kept until backward; recomputed: the activations of the block that is recomputed
        self.checkpointing = config.training.activation_checkpointing
        if self.checkpointing:
            self.stored_bytes = 4 * config.model.d_model * self.length * len(activations)
            if self.checkpointing == "matmuls":
                self.stored_bytes += sum(layer.matmul_bytes for layer in narrow.layers)
            self.recomputed_bytes = max(activations)
        else:
            self.stored_bytes = sum(activations)
            self.recomputed_bytes = 0
        # the backward pass costs two forward passes; checkpointing of whole blocks repeats the forward pass
        self.passes = 4 if self.checkpointing is True else 3

    def layout(self, *, data: int, shard: int, context_parallel: int = 1, sequences: int) -> Layout:
        """Estimate the cost of a layout.

        Args:
            data: replicas of the model.
            shard: GPUs that a replica is sharded over, besides context parallelism.
            context_parallel: GPUs that share each sequence.
            sequences: sequences per micro-batch of a data-parallel rank.
        """
        shards = shard * context_parallel
        gpus = data * shard * context_parallel
        settings = self.config.training
        parameters = self.cost.parameters
        micro_batches = settings.batch_size // (data * shard * sequences)
        # parameters, gradients and two moments are sharded; logits and a recomputed block are not in memory together
        gpu_sequences = sequences / context_parallel
        vocab_size = self.config.model.vocab_size
        logits = BYTES_PER_LOGIT * min(gpu_sequences * self.length * vocab_size, LOGITS_AT_ONCE["cuda"])
        memory = 16 * parameters / shards + gpu_sequences * self.stored_bytes
        memory += max(gpu_sequences * self.recomputed_bytes, logits)
        # blocks are gathered twice, other parameters once; gradients are scattered once, and summed over replicas
        rest = parameters - sum(layer.parameters for layer in self.cost.layers)
        width = self.bytes_per_gathered
        received = (width * (2 * parameters - rest) + 4 * parameters) * (shards - 1) / shards
        copied = 2 * 4 * parameters / shards * (data - 1) / data
        if self.config.distributed.gather_once:  # everything once per step; the whole model and gradients in memory
            received = (width + 4) * parameters * (shards - 1) / shards / micro_batches
            copied = copied / micro_batches
        if gpus > 1:
            memory += (width + 4) * parameters if self.config.distributed.gather_once else self.gathered_bytes
        tokens = settings.batch_size * self.length
        received_within_replica = received + sequences * self.context_parallel_bytes(context_parallel)
        sending = received_within_replica / self._link_rate(shards) + copied / self._link_rate(gpus)
        return Layout(
            data=data,
            shard=shard,
            context_parallel=context_parallel,
            grad_accum_steps=micro_batches,
            memory=memory,
            received=received_within_replica,
            copied=copied,
            computing=self.passes * self.cost.flops_per_token * tokens / (gpus * self.rate),
            sending=micro_batches * sending,
            fits=memory <= MEMORY_FRACTION * self.gpu.memory,
        )

    def layouts(self, gpus: int) -> list[Layout]:
        """Return all layouts for a number of GPUs, each with the fewest micro-batches that fit into memory.

        Layouts that fit come first, the fastest of them first.

        Raises:
            SeqmixError: no layout divides the batch.
        """
        layouts = [self._best_layout(*sizes) for sizes in self._sizes(gpus)]
        if not layouts:
            raise SeqmixError(
                f"no layout of {gpus} GPUs divides training.batch_size = {self.config.training.batch_size}: choose a "
                f"batch size that is a multiple of {gpus}, or another number of GPUs"
            )
        return sorted(layouts, key=lambda layout: (not layout.fits, layout.seconds[1], layout.memory))

    def context_parallel_bytes(self, ranks: int) -> float:
        """Return the bytes that a GPU receives per sequence if `ranks` GPUs share the sequence."""
        if ranks == 1:
            return 0.0
        by_block = {
            name: received(self.config.model, self.length, ranks=ranks, layer=self.config.model.layers.index(name))
            for name in set(self.config.model.layers)
        }
        return sum(by_block[name] for name in self.config.model.layers) * (2 if self.checkpointing else 1)

    @cached_property
    def _supports_context_parallel(self) -> bool:
        return all(block.mixer.supports_context_parallel for block in build_meta(self.config.model).blocks)

    def _sizes(self, gpus: int) -> Iterator[tuple[int, int, int]]:
        """Yield data, shard and context_parallel of all layouts; the GPUs that share a sequence are in one machine."""
        batch = self.config.training.batch_size
        is_divisible = self._supports_context_parallel and self.length >= GPUS_PER_MACHINE
        for context_parallel in _divisors(GPUS_PER_MACHINE) if is_divisible else [1]:
            dp_ranks, remainder = divmod(gpus, context_parallel)
            for shard in [] if remainder else _divisors(dp_ranks):
                data = dp_ranks // shard
                if batch % (data * shard) == 0:
                    yield data, shard, context_parallel

    def _best_layout(self, data: int, shard: int, context_parallel: int) -> Layout:
        """Return the layout with the fewest micro-batches that fits into memory; if none fits, that with the most."""
        rows = self.config.training.batch_size // (data * shard)
        for sequences in reversed(_divisors(rows)):
            layout = self.layout(data=data, shard=shard, context_parallel=context_parallel, sequences=sequences)
            if layout.fits or sequences == 1:
                return layout
        raise AssertionError("one sequence divides every number of rows")

    def _link_rate(self, gpus: int) -> float:
        """Return the bytes per second that a GPU receives in a group of this many GPUs."""
        return self.gpu.rate_within_machine if gpus <= GPUS_PER_MACHINE else self.gpu.rate_between_machines


@dataclass(frozen=True)
class _CountingGroup(ContextParallel):
    """Context-parallel group of one process, which counts the bytes that the others would send to it."""

    received: list[int]
    """Bytes that each call would receive, in forward and backward."""

    def gather(self, x: Tensor) -> Tensor:
        # values in forward, and gradients of floating-point values in backward
        self.received.append((1 + x.is_floating_point()) * (self.size - 1) * x.nbytes)
        return x.expand(self.size, *x.shape)

    def exchange(
        self,
        sent: Sequence[Tensor],  # noqa: ARG002
        like: Sequence[Tensor],
        distance: int,  # noqa: ARG002
    ) -> tuple[list[Tensor], list[Any]]:
        # once in forward and once in backward; the last rank receives most
        self.received.append(2 * sum(x.nbytes for x in like))
        return [torch.empty_like(x) for x in like], []


def received(config: ModelConfig, tokens: int, *, ranks: int, layer: int = 0) -> int:
    """Return the bytes that a layer receives per sequence with context parallelism, in forward and backward.

    Args:
        config: the model.
        tokens: length of the sequence.
        ranks: processes that share the sequence; the count is that of the one that receives most.
        layer: index of the layer, from 0.

    Raises:
        ContractError: the layer does not support context parallelism.
    """
    mixer: SequenceMixer = build_meta(config).blocks[layer].mixer
    if not mixer.supports_context_parallel:
        require_sequential(mixer.traits, mixer.kind)
        leaves = to_dict(mixer.init_state(1)).values()
        gradients = sum(leaf.nbytes for leaf in leaves if leaf.is_floating_point())
        return sum(leaf.nbytes for leaf in leaves) + (gradients if ranks > 2 else 0)  # between the first and the last
    mixer.cp_group = group = _CountingGroup("", rank=ranks - 1, size=ranks, received=[])
    mixer(torch.empty(1, tokens // ranks, config.d_model, device="meta"))
    return sum(group.received)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
