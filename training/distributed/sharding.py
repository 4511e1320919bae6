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
    """Return a function that shards the parameters of a module; None in a single process.

    The function is called for each block, and then for the model. Blocks are gathered one at a time, in forward and
    backward. They are gathered in float32 by default: a bfloat16 copy rounds decays and norms too, which autocast does
    not. Gradients are averaged over all processes.
    """
    if groups.size == 1:
        return None
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # harmless: a state may be a view, but outputs are never written in place under autograd
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    gather_dtype = torch.bfloat16 if config.gather_dtype == "bfloat16" else None
    # cast_forward_inputs would cast states too
    policy = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    reshard = False if config.gather_once else None  # None is torch's default: all modules but the outermost
    return lambda module: fully_shard(module, mesh=groups.mesh, mp_policy=policy, reshard_after_forward=reshard)


def keep_gathered(model: LanguageModel, keep: bool) -> None:
    """If `keep`, make backward passes leave parameters gathered and gradients unreduced; else reshard and reduce."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not keep)
        model.set_reshard_after_backward(not keep)


def reshard(model: LanguageModel) -> None:
    """Reshard parameters, some of which stay gathered after a forward pass without a backward pass."""
    for module in model.modules():
        if (method := getattr(module, "reshard", None)) is not None:  # a method of FSDP modules, imported lazily
            method()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a sharded one, by a collective call; an ordinary tensor unchanged."""
    sharded = _as_dtensor(tensor)
    return tensor if sharded is None else sharded.full_tensor()


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor; an ordinary tensor unchanged."""
    sharded = _as_dtensor(tensor)
    return tensor if sharded is None else sharded.to_local()


def is_sharded(tensor: Tensor) -> bool:
    """Return True if a tensor is sharded over processes."""
    return _as_dtensor(tensor) is not None


def chunk_of(tensor: Tensor) -> Chunk:
    """Return this process's shard of a tensor, with its offset; an ordinary tensor as one chunk."""
    if (sharded := _as_dtensor(tensor)) is None:
        return Chunk.whole(tensor)
    (place,) = sharded.__create_chunk_list__()  # the protocol of torch's distributed checkpoint
    return Chunk(sharded.to_local(), tuple(place.offsets), tuple(sharded.shape))


def shard_of(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a full tensor that is sharded as `like`, without communication."""
    if (sharded := _as_dtensor(like)) is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device)
    return distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None).to_local()


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor) -> None:
    """Copy a full tensor into one that may be sharded, without communication."""
    local_tensor(tensor).copy_(shard_of(value, tensor))


def _as_dtensor(tensor: Tensor) -> "DTensor | None":
    """Return the tensor as a DTensor; None if it is an ordinary tensor."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return None  # avoids the slow import below
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None
