"""Roles of parameters: a module declares what each of its parameters does, and training reads it.

    role          purpose                                                        weight decay   with Muon
    matrix        map between vectors of tokens, such as queries or an FFN       yes            Muon, by block of rows
    gate          map of a token to gates: decays, step sizes, write rates       yes            AdamW
    embedding     vectors of the vocabulary                                      yes            AdamW
    readout       map to the logits                                              yes            AdamW
    convolution   filter over tokens                                             no             AdamW
    rate          decay rate, step size, or bias of a gate                       no             AdamW
    vector        bias, skip, mixture, or factor by channel                      no             AdamW
    norm          weight or bias of a norm                                       no             AdamW

A module declares the roles of its own parameters, and of those of its parts where they differ from the parts' own:

    class Mixer(SequenceMixer):
        parameter_roles = {"decay": Role.RATE, "filter": Role.CONVOLUTION}

Layers of torch.nn need no declaration. The number of dimensions decides nothing, with one exception: a parameter of one
dimension without a declaration is a vector, because all roles that it could have are trained in the same way.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn

from ...registry import nearest_hint
from .traits import ContractError


class Role(StrEnum):
    """Purpose of a parameter."""

    MATRIX = "matrix"
    GATE = "gate"
    EMBEDDING = "embedding"
    READOUT = "readout"
    CONVOLUTION = "convolution"
    RATE = "rate"
    VECTOR = "vector"
    NORM = "norm"

    @property
    def decays(self) -> bool:
        """True if weight decay applies."""
        return self in (Role.MATRIX, Role.GATE, Role.EMBEDDING, Role.READOUT)


class RowBlock(NamedTuple):
    """Consecutive rows of a weight matrix that are one map, such as the queries in an input projection."""

    name: str
    rows: int
    """Number of rows."""
    role: Role = Role.MATRIX
    heads: int = 1
    """Number of heads that the rows are split over, in their order."""


Declaration: TypeAlias = Role | str | Sequence[RowBlock]
"""Declared role of a parameter; for a matrix of several maps, its blocks of rows, from the first row to the last."""


Roles: TypeAlias = Mapping[str, Declaration]
"""Declared roles of a module's parameters, by name; the name may lead into a part, as "in_proj.weight"."""


class ParameterRole(NamedTuple):
    """Role of a parameter."""

    role: Role
    """Role of the whole parameter; `matrix` if it has several blocks of rows."""
    blocks: tuple[RowBlock, ...] = ()
    """Blocks of rows; empty if the parameter is a single map, or no map."""


TORCH_LAYERS: Mapping[type[nn.Module], Mapping[str, Role]] = {
    nn.Linear: {"weight": Role.MATRIX, "bias": Role.VECTOR},
    nn.Embedding: {"weight": Role.EMBEDDING},
    nn.LayerNorm: {"weight": Role.NORM, "bias": Role.NORM},
    nn.RMSNorm: {"weight": Role.NORM},
    nn.GroupNorm: {"weight": Role.NORM, "bias": Role.NORM},
    nn.Conv1d: {"weight": Role.CONVOLUTION, "bias": Role.VECTOR},
}
"""Roles of the parameters of torch's layers."""


def roles_of(module: nn.Module) -> dict[str, ParameterRole]:
    """Return the role of every parameter of a module by name; a parameter that is used twice appears once.

    A declaration of a module has precedence over those of its parts.

    Raises:
        ContractError: a parameter has no role, or a declaration names no parameter or does not fit it.
    """
    declared: dict[str, tuple[Declaration, nn.Module]] = {}
    for path, part in module.named_modules(remove_duplicate=False):  # outer modules come before their parts
        for name, declaration in _declarations(part).items():
            declared.setdefault(f"{path}.{name}" if path else name, (declaration, part))
    roles = {}
    for name, parameter in module.named_parameters():
        if name in declared:
            roles[name] = _resolve(name, parameter, *declared[name])
        elif parameter.ndim <= 1:
            roles[name] = ParameterRole(Role.VECTOR)
        else:
            owner = module.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            raise ContractError(
                f"expected a role for the parameter {name} {list(parameter.shape)}, got none: declare "
                f"parameter_roles = {{{leaf!r}: ...}} in {type(owner).__name__}; roles: {', '.join(Role)}"
            )
    return roles


def _declarations(module: nn.Module) -> Roles:
    """Return the roles that one module declares; for an undeclared layer of torch, those in `TORCH_LAYERS`.

    Raises:
        ContractError: a declaration names an attribute that does not exist.
    """
    declared: Roles | None = getattr(module, "parameter_roles", None)
    if not declared:
        return next((roles for layer, roles in TORCH_LAYERS.items() if isinstance(module, layer)), {})
    for name in declared:
        owner = module
        *path, leaf = name.split(".")
        for step in path:
            owner = getattr(owner, step, None)
        if owner is not None and not hasattr(owner, leaf):
            known = [known for known, _ in module.named_parameters()]
            message = f"{type(module).__name__}.parameter_roles names {name!r}, which is not a parameter"
            raise ContractError(message + nearest_hint(name, known))
    return declared


def _resolve(name: str, parameter: Tensor, declaration: Declaration, owner: nn.Module) -> ParameterRole:
    """Check that a declaration fits its parameter, and return the parameter's role.

    Raises:
        ContractError: the declaration is not a role, or its blocks do not have as many rows as the parameter.
    """
    if isinstance(declaration, str):
        if declaration not in list(Role):
            raise ContractError(
                f"{type(owner).__name__}.parameter_roles expects a role for {name}, got {declaration!r}"
                f"{nearest_hint(declaration, list(Role))}; roles: {', '.join(Role)}"
            )
        return ParameterRole(Role(declaration))
    blocks = tuple(declaration)
    if (rows := sum(block.rows for block in blocks)) != parameter.shape[0]:
        raise ContractError(
            f"{type(owner).__name__}.parameter_roles expects blocks with {parameter.shape[0]} rows in total for "
            f"{name}, got {rows}"
        )
    return ParameterRole(Role.MATRIX, blocks)
