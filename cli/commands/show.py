"""`seqmix show`: show the cost of a model."""

from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any

import typer

from ...lab.units import si, si_bytes
from ...mixers.base.roles import ParameterRole
from ...models import LayerCost, ModelCost, account
from ...models.builder import build_meta
from ...training import RunConfig, load_config
from ...training.distributed.layouts import received
from ...training.optimizer import trainings_of
from ..console import plain_table, terminal
from ..options import Overrides


@dataclass(frozen=True)
class ParameterTraining:
    """A parameter, and how it is trained."""

    name: str
    """Name of the parameter."""
    shape: list[int]
    """Its shape."""
    role: str
    """Its role, which decides how it is trained."""
    blocks: list[dict[str, Any]]
    """Blocks of its rows, such as queries and keys, with their names, numbers of rows and roles."""
    optimizer: str
    """Optimizer that updates it."""
    weight_decay: float
    """Weight decay."""
    learning_rate_multiplier: float
    """Factor of the learning rate."""


@dataclass(frozen=True)
class ParameterList:
    """Result of `seqmix show --parameters`."""

    parameters: list[ParameterTraining]
    """All parameters of the model."""


def show(
    config: Annotated[str, typer.Argument(help="A preset (retnet-tiny) or a YAML file.", metavar="CONFIG")],
    overrides: Overrides = None,
    length: Annotated[
        int | None, typer.Option(help="Sequence length in tokens; data.sequence_length by default.", min=1, max=2**31)
    ] = None,
    parameters: Annotated[
        bool, typer.Option("--parameters", help="Show the shape, role and optimizer of each parameter instead.")
    ] = False,
) -> ModelCost | ParameterList:
    """Show a model's cost by layer without allocating it: parameters, FLOPs, state, activations."""
    loaded = load_config(config, overrides or [])
    return print_parameters(loaded) if parameters else print_cost(loaded, length)


def print_parameters(config: RunConfig) -> ParameterList:
    """Print each parameter of a configuration's model, and how it is trained."""
    trainings = trainings_of(build_meta(config.model), config.training)
    table = plain_table("parameter", "shape", "role", "optimizer", "decay", "rate")
    for each in trainings:
        shape = " x ".join(map(str, each.parameter.shape))
        numbers = f"{each.weight_decay:g}", f"x {each.multiplier:g}"
        table.add_row(each.name, shape, _role_text(each.role), each.optimizer, *numbers)
    terminal().print(table)
    return ParameterList(
        [
            ParameterTraining(
                name=each.name,
                shape=list(each.parameter.shape),
                role=str(each.role.role),
                blocks=[block._asdict() for block in each.role.blocks],
                optimizer=each.optimizer,
                weight_decay=each.weight_decay,
                learning_rate_multiplier=each.multiplier,
            )
            for each in trainings
        ]
    )


def _role_text(role: ParameterRole) -> str:
    """Return a role's name, with the rows of each block: "matrix (q 128, k 128, gate beta 4)"."""
    blocks = [
        f"{'' if block.role is role.role else f'{block.role} '}{block.name} {block.rows}" for block in role.blocks
    ]
    return f"{role.role} ({', '.join(blocks)})" if blocks else str(role.role)


def print_cost(config: RunConfig, length: int | None = None) -> ModelCost:
    """Print the cost of a configuration's model, and return it.

    Args:
        config: the configuration.
        length: sequence length in tokens; data.sequence_length when None.
    """
    cost = account(config.model, length=length or config.data.sequence_length)
    console = terminal()
    table = plain_table("layers", "block", "mixer", "parameters", "forward/token", "state", "activations")
    index = 0
    for layer, equal_layers in groupby(cost.layers):  # equal layers share a row
        count = len(list(equal_layers))
        name = f"{index}" if count == 1 else f"{index}-{index + count - 1}"
        table.add_row(name, layer.block, layer.mixer, *_cells(layer))
        index += count
    table.add_section()
    table.add_row("all", "", "", *_cells(cost))
    console.print(table)
    console.print(
        f"{cost.parameters:,} parameters ({si_bytes(cost.parameter_bytes)}), "
        f"{cost.body_parameters:,} of them outside embedding and output projection."
    )
    console.print(
        f"Recurrent state of one sequence after {cost.length:,} tokens: {cost.state_elements:,} elements, "
        f"{si_bytes(cost.state_bytes)}. Activations: memory that training stores for one sequence of {cost.length:,} "
        "tokens."
    )
    checkpointed = [si_bytes(cost.checkpointed_bytes(matmuls=matmuls)) for matmuls in (False, True)]
    console.print(f"With training.activation_checkpointing: {checkpointed[0]}; with matmuls: {checkpointed[1]}.")
    if (ranks := config.distributed.context_parallel) > 1:
        traffic = sum(received(config.model, cost.length, ranks=ranks, layer=i) for i in range(config.model.n_layers))
        console.print(
            f"Context parallelism: each of {ranks} processes stores 1/{ranks} of the activations, and receives up to "
            f"{si_bytes(traffic)} per sequence."
        )
    per_step = config.training.batch_size * config.data.sequence_length
    tokens = per_step * config.training.steps
    console.print(
        f"Training: {config.training.steps:,} steps of {per_step:,} tokens, {si(tokens)}tokens in all, "
        f"about {si(3 * cost.flops_per_token * tokens)}FLOP."
    )
    return cost


def _cells(cost: LayerCost | ModelCost) -> tuple[str, ...]:
    parameters = f"{cost.parameters:,}"
    flops = f"{si(cost.flops_per_token)}FLOP"
    return parameters, flops, si_bytes(cost.state_bytes), si_bytes(cost.activation_bytes)
