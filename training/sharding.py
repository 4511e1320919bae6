"""A model in pieces: fully sharded data parallelism (FSDP2), a block at a time, and its tensors as a whole again.

Parameters are sharded over the mesh's last dimension, copies of the model run over its first (hybrid sharding).
"""

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models import LanguageModel
from .process_groups import ProcessGroups

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard(model: LanguageModel, groups: ProcessGroups) -> None:
    """Leave this process its piece of every parameter, and split sequences over its context-parallel group.

    Blocks are gathered one at a time, forward and backward, in float32: a 16-bit copy would round decays and norms
    too, which autocast does not. Gradients are the mean over all processes.
    """
    if groups.size == 1:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # nothing that a model returns is written in place while there are gradients: a state may be a view
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    # by default it casts what goes in, states too
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=groups.mesh, mp_policy=policy)
    fully_shard(model, mesh=groups.mesh, mp_policy=policy)
    model.set_cp_group(groups.cp_group)


def reshard(model: LanguageModel) -> None:
    """Make parameters pieces again: after a forward pass without backward, some are gathered still."""
    for module in model.modules():
        if (method := getattr(module, "reshard", None)) is not None:  # FSDP's, which is imported where it is used
            method()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its pieces, for which every process has to ask; a whole one as it is."""
    pieces = _pieces(tensor)
    return tensor if pieces is None else pieces.full_tensor()


def own(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    pieces = _pieces(tensor)
    return tensor if pieces is None else pieces.to_local()


@torch.no_grad()
def assign(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be in pieces; no process waits for another."""
    if (pieces := _pieces(tensor)) is not None:
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(
            value.to(tensor.device), pieces.device_mesh, pieces.placements, src_data_rank=None
        ).to_local()
    own(tensor).copy_(value)


def _pieces(tensor: Tensor) -> "DTensor | None":
    """The tensor as one in pieces; None if it is whole."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return None  # what is whole needs nothing imported
    from torch.distributed.tensor import DTensor

    return tensor if isinstance(tensor, DTensor) else None
