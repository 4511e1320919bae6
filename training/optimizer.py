"""The optimizer of a run: parameter groups, weight decay and initial state."""

from collections import ChainMap
from collections.abc import MutableMapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..mixers.base.roles import ParameterRole, Role, roles_of
from ..models.parametrization import width_multipliers
from ..registry import SeqmixError, import_object
from .config import TrainingConfig
from .muon import Muon


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


class ParameterTraining(NamedTuple):
    """Optimizer, weight decay and learning rate of one parameter, as its role decides."""

    name: str
    """Name of the parameter in the model."""
    parameter: nn.Parameter
    """The parameter."""
    role: ParameterRole
    """Role of the parameter, with its blocks of rows."""
    optimizer: str
    """Optimizer that updates the parameter: `muon`, `normuon`, `adamw`, or the path of another one."""
    weight_decay: float
    """Weight decay of the parameter; 0 if its role is not decayed."""
    multiplier: float
    """Factor of the learning rate (muP); the weight decay is divided by it, so that their product is the same."""
    gate_multiplier: float
    """Factor of the learning rate of rows that compute gates, which AdamW updates also in a matrix of Muon's."""


def trainings_of(model: nn.Module, config: TrainingConfig) -> list[ParameterTraining]:
    """Return how each parameter that requires a gradient is trained.

    Raises:
        ContractError: a parameter has no role.
    """
    roles = roles_of(model)
    uses_muon = config.optimizer in ("muon", "normuon")
    multipliers = width_multipliers(model, roles)
    result = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = roles[name]
        by_muon = uses_muon and role.role is Role.MATRIX
        multiplier = multipliers[name].muon if by_muon else multipliers[name].adamw
        decay = config.weight_decay / multiplier if role.role.decays else 0.0
        optimizer = config.optimizer if by_muon or not uses_muon else "adamw"
        result.append(ParameterTraining(name, parameter, role, optimizer, decay, multiplier, multipliers[name].adamw))
    return result


def build_optimizer(model: nn.Module, config: TrainingConfig) -> AnyOptimizer:
    """Build the optimizer of a model, from the roles of its parameters (`seqmix.mixers.base.roles`).

    Every parameter is in exactly one group; parameters without `requires_grad` are left out. Weight decay applies to
    matrices, embedding and output projection, not to rates, norms, convolutions and vectors.

    `muon` and `normuon` update matrices, each of their maps (queries, keys, ...) separately, and AdamW everything else.
    Their steps are scaled to those of AdamW, so that both share one learning rate and one weight decay.

    Raises:
        SeqmixError: a parameter has no role, or an optimizer given by path cannot be imported or rejects its arguments.
    """
    if not isinstance(config, TrainingConfig):
        raise SeqmixError(
            f"build_optimizer expects a TrainingConfig, such as config.training, got a {type(config).__name__}"
        )
    trainings = trainings_of(model, config)
    if ":" in config.optimizer:
        make = import_object(config.optimizer, "the optimizer")
        try:
            return make(_groups(trainings, config.learning_rate), lr=config.learning_rate, **config.optimizer_options)
        except (TypeError, ValueError) as error:
            raise SeqmixError(f"training.optimizer: {config.optimizer} rejects its arguments: {error}") from error
    optimizers: list[torch.optim.Optimizer] = []
    if rest := [each for each in trainings if each.optimizer == "adamw"]:
        adamw = torch.optim.AdamW(
            _groups(rest, config.learning_rate), lr=config.learning_rate, betas=config.betas, fused=True
        )
        # created now, not by the first step, so that checkpoints have it also for parameters without a gradient
        for each in rest:
            adamw.state[each.parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=each.parameter.device),
                "exp_avg": torch.zeros_like(each.parameter),
                "exp_avg_sq": torch.zeros_like(each.parameter),
            }
        optimizers.append(adamw)
    if matrices := [each for each in trainings if each.optimizer != "adamw"]:
        muon = Muon(
            _groups(matrices, config.learning_rate),
            {each.parameter: each.role for each in matrices},
            lr=config.learning_rate,
            momentum=config.muon_momentum,
            betas=config.betas,
            per_head=config.muon_split == "heads",
            normalize_rows=config.optimizer == "normuon",
        )
        optimizers.append(muon)
    return optimizers[0] if len(optimizers) == 1 else Together(*optimizers)


def set_learning_rate(optimizer: AnyOptimizer, rate: float) -> None:
    """Set the learning rate of a step: in each parameter group, `rate` times the group's multiplier (muP)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_multiplier", 1.0)


def _groups(trainings: Sequence[ParameterTraining], rate: float) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer: parameters with equal settings together."""
    groups: dict[tuple[float, ...], dict[str, Any]] = {}
    for each in trainings:
        key = each.weight_decay, each.multiplier, each.gate_multiplier
        if key not in groups:
            groups[key] = {
                "params": [],
                "lr": rate * each.multiplier,
                "weight_decay": each.weight_decay,
                "lr_multiplier": each.multiplier,
                "gate_multiplier": each.gate_multiplier,
            }
        groups[key]["params"].append(each.parameter)
    return list(groups.values())


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
