"""Parametrisations that keep the best learning rate when a model becomes wider (muP) and deeper (CompleteP).

    m = fan-in of a matrix / its fan-in in the base model, of width base_width and otherwise equal

                      initial standard deviation      learning rate of AdamW       weight decay
    matrix, gate      as usual, ~ 1/sqrt(fan-in)      x 1/m                        x m
    readout           x 1/sqrt(m) more                x 1/m                        x m
    embedding         that of the base model          x 1                          x 1
    others            as usual                        x 1                          -

The scores of softmax attention are divided by K instead of sqrt(K): multiplied by sqrt(base K / K). Muon's steps have a
size of sqrt(rows / columns) in the spectral norm. With CompleteP, the branches of a model of depth L are multiplied by
base_depth / L.

muP is by Yang and Hu (arXiv 2203.03466, Table 3), CompleteP by Dey et al. (arXiv 2505.01618, alpha = 1); the weight
decay keeps the product of both constant (Wang and Aitchison, arXiv 2405.13698). Muon's scale is that of Bernstein et
al. (2024). The authors' epsilon of AdamW per depth is left out.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple, TypeAlias

from pydantic import Field
from torch import nn

from ..mixers.base.roles import ParameterRole, Role
from ..registry import Config

Shape: TypeAlias = tuple[int, ...]


class Standard(Config):
    """Standard parametrisation: one learning rate for all parameters, initial values as in the mixers' papers."""

    kind: Literal["standard"] = "standard"


class MuP(Config):
    """Maximal update parametrisation (muP): the best learning rate is that of the base model, whatever the width."""

    kind: Literal["mup"] = "mup"
    base_width: int = Field(gt=0, le=2**20)
    """Width d_model of the base model, for which the learning rate is tuned. The other fields are those of the model:
    as the number of heads stays the same, heads become wider with d_model."""


class CompleteP(MuP):
    """muP for width, and branches scaled by 1 / depth: the best learning rate is that of the base model."""

    kind: Literal["completep"] = "completep"  # pyright: ignore[reportIncompatibleVariableOverride] another name
    base_depth: int = Field(gt=0, le=10_000)
    """Number of layers of the base model."""


Parametrization = Annotated[Standard | MuP | CompleteP, Field(discriminator="kind")]


def shapes_of(model: nn.Module) -> dict[str, Shape]:
    """Return the shape of every parameter by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def fan_in_ratio(shape: Shape, base: Shape) -> float:
    """Return the fan-in of a weight divided by its fan-in in the base model.

    The fan-in is the second dimension of a matrix [fan-out, fan-in] and of the weight of experts [experts, fan-in,
    fan-out].
    """
    return shape[1] / base[1]


def initial_std(std: float, role: Role, shape: Shape, base: Shape) -> float:
    """Return the initial standard deviation of a matrix, given that of the same matrix in the base model (`std`)."""
    if role is Role.EMBEDDING:
        return std
    ratio = fan_in_ratio(shape, base)
    return std / ratio if role is Role.READOUT else std / ratio**0.5


class Multipliers(NamedTuple):
    """Factors of a parameter's learning rate."""

    adamw: float = 1.0
    """Factor if AdamW updates the parameter."""
    muon: float = 1.0
    """Factor if Muon updates the parameter."""


def multipliers_of(role: Role, shape: Shape, base: Shape) -> Multipliers:
    """Return the factors of a parameter's learning rate, from its shapes in the model and in the base model."""
    if role not in (Role.MATRIX, Role.GATE, Role.READOUT):
        return Multipliers()
    return Multipliers(1 / fan_in_ratio(shape, base), _muon_step(shape) / _muon_step(base))


def _muon_step(shape: Shape) -> float:
    """Return the intended spectral norm of a step, sqrt(rows / columns), relative to that of Muon's own steps."""
    rows, columns = shape[-2:]
    return (rows / columns) ** 0.5 / max(rows, columns) ** 0.5


def width_multipliers(model: nn.Module, roles: Mapping[str, ParameterRole]) -> dict[str, Multipliers]:
    """Return the factors of each parameter's learning rate; 1 for modules without a base model.

    Args:
        model: the model, or a module that contains it.
        roles: role of each parameter, by name.
    """
    bases: dict[str, Shape] = {}
    for path, part in model.named_modules():
        for name, shape in getattr(part, "base_shapes", {}).items():
            bases[f"{path}.{name}" if path else name] = shape
    shapes = shapes_of(model)
    return {
        name: multipliers_of(role.role, shapes[name], bases[name]) if name in bases else Multipliers()
        for name, role in roles.items()
    }
