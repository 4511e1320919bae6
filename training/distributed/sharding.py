"""Fully sharded data parallelism (FSDP2), one block at a time, and full tensors from their shards.

Parameters are sharded over the mesh's last dimension; the model is replicated over its first (hybrid sharding).
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...models import LanguageModel
from ..config import DistributedConfig
from ..tensor_files import Chunk
from .process_groups import ProcessGroups

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def sharder(groups: ProcessGroups, config: DistributedConfig) -> Callable[[nn.Module], object] | None:
    """What shards the parameters of a module, blocks before the model; None in a single process.

    Blocks are gathered one at a time, forward and backward, by default in float32: a 16-bit copy rounds decays and
    norms too, which autocast does not. Gradients are the mean over all processes.
    """
    if groups.size == 1:
        return None
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # the model's outputs are never written in place under autograd: a state may be a view
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    narrow = torch.bfloat16 if config.gather_dtype == "bfloat16" else None
    # by default it casts all inputs, states too
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    again = False if config.gather_once else None  # None is torch's own choice: all but the outermost
    return lambda module: fully_shard(module, mesh=groups.mesh, mp_policy=policy, reshard_after_forward=again)


def keep_gathered(model: LanguageModel, keep: bool) -> None:
    """Whether the next backward pass leaves parameters gathered and gradients unreduced, as another follows."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not keep)
        model.set_reshard_after_backward(not keep)


def reshard(model: LanguageModel) -> None:
    """Reshard parameters: after a forward pass without backward, some are still gathered."""
    for module in model.modules():
        if (method := getattr(module, "reshard", None)) is not None:  # of FSDP, which is imported lazily
            method()


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, a collective call; any other tensor as it is."""
    sharded = _sharded(tensor)
    return tensor if sharded is None else sharded.full_tensor()


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; any other tensor as it is."""
    sharded = _sharded(tensor)
    return tensor if sharded is None else sharded.to_local()


def is_sharded(tensor: Tensor) -> bool:
    """Whether processes have shards of it."""
    return _sharded(tensor) is not None


def chunk_of(tensor: Tensor) -> Chunk:
    """This process's shard of a tensor, and its place there; any other tensor as a whole."""
    if (sharded := _sharded(tensor)) is None:
        return Chunk.whole(tensor)
    (place,) = sharded.__create_chunk_list__()  # as torch's distributed checkpoint asks
    return Chunk(sharded.to_local(), tuple(place.offsets), tuple(sharded.shape))


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor) -> None:
    """Copy a full tensor into one that may be sharded, without communication."""
    if (sharded := _sharded(tensor)) is not None:
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(
            value.to(tensor.device), sharded.device_mesh, sharded.placements, src_data_rank=None
        ).to_local()
    local_tensor(tensor).copy_(value)


def _sharded(tensor: Tensor) -> "DTensor | None":
    """The tensor as a DTensor; None if it is an ordinary one."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return None  # an ordinary tensor needs no import
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None
