"""The optimizer of a run: parameter groups, weight decay and initial state."""

from collections import ChainMap
from collections.abc import MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..registry import SeqmixError, import_object
from .config import TrainingConfig


class Together:
    """Several optimizers with disjoint parameters, used as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> MutableMapping[Tensor, Any]:
        """Optimizer state of each parameter."""
        return ChainMap(*({**optimizer.state} for optimizer in self.optimizers))

    def step(self) -> None:
        """Step every optimizer."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)


AnyOptimizer: TypeAlias = torch.optim.Optimizer | Together


def build_optimizer(model: nn.Module, config: TrainingConfig) -> AnyOptimizer:
    """Build the optimizer of a model. Weight decay applies to matrices, not to vectors.

    Every parameter is in exactly one group; parameters without `requires_grad` are left out.

    `muon` updates the weights of the blocks' linear layers with Muon, and everything else (embedding, output
    projection, vectors, convolutions) with AdamW. Its steps are scaled to those of AdamW (0.2 sqrt(max(rows, columns)),
    Liu et al. 2025, "Muon is scalable for LLM training"), so that both share one learning rate and one weight decay.

    Raises:
        SeqmixError: an optimizer given by path cannot be imported, or rejects its arguments.
    """
    if not isinstance(config, TrainingConfig):
        raise SeqmixError(
            f"build_optimizer expects a TrainingConfig, such as config.training, got a {type(config).__name__}"
        )
    in_blocks = model.get_submodule("blocks").modules() if config.optimizer == "muon" else ()
    weights = (module.weight for module in in_blocks if isinstance(module, nn.Linear))
    matrices = dict.fromkeys(weight for weight in weights if weight.requires_grad)  # deduplicated
    rest = [p for p in model.parameters() if p not in matrices and p.requires_grad]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if ":" in config.optimizer:
        make = import_object(config.optimizer, "the optimizer")
        try:
            return make(groups, lr=config.learning_rate, **config.optimizer_options)
        except (TypeError, ValueError) as error:
            raise SeqmixError(f"training.optimizer: {config.optimizer} rejects its arguments: {error}") from error
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    # created now, not by the first step, so that checkpoints have it also for parameters without a gradient
    for parameter in rest:
        adamw.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    if not matrices:
        return adamw
    muon = torch.optim.Muon(
        list(matrices),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    for matrix in matrices:
        muon.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix)}
    return Together(adamw, muon)


@torch.no_grad()
def start_moments(parameters: Sequence[nn.Parameter], optimizer: AnyOptimizer) -> None:
    """Make the optimizer allocate its state for these parameters, so that a checkpoint can be loaded into it.

    Steps once with zero gradients, and restores the parameters.
    """
    if all(optimizer.state.get(parameter) for parameter in parameters):
        return
    before = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with torch.enable_grad():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for parameter, value in zip(parameters, before, strict=True):
        parameter.copy_(value)
