"""Tables for the terminal: what mixers declare, what a model costs."""

from itertools import groupby

from ..mixers import MIXERS, Paradigm
from ..models import LayerCost, ModelCost
from ..training import RunConfig
from .console import plain_table, terminal


def mixer_table() -> None:
    """Print the registered mixers, where plug-ins come from, and the plug-ins that cannot be imported."""
    console = terminal()
    table = plain_table("kind", "paradigms", "state", "packing", "shift-invariant")
    foreign: dict[str, str] = {}
    for kind in MIXERS.kinds():
        if not (module := MIXERS.origin(kind)).startswith("seqmix."):
            foreign[kind] = module
        try:
            traits = MIXERS.resolve(kind).example().traits
        except ValueError as error:
            table.add_row(kind, f"not known without a configuration: {error}")
            continue
        table.add_row(
            kind,
            " ".join(p for p in Paradigm if p in traits.paradigms),
            traits.state,
            "yes" if traits.packing else "no",
            "yes" if traits.shift_invariant else "no",
        )
    console.print(table)
    console.print("These are the default configurations; options can change them (a window bounds attention's state).")
    for kind, module in foreign.items():
        console.print(f"{kind} comes from {module}")
    for name, reason in MIXERS.broken().items():
        console.print(f"plug-in {name} is broken: {reason}", style="red")


def cost_table(config: RunConfig, cost: ModelCost) -> None:
    """Print a model's cost; runs of equal layers share a line."""
    table = plain_table("layers", "block", "mixer", "parameters", "forward/token", "state", "activations")
    index = 0
    for layer, run in groupby(cost.layers):
        count = len(list(run))
        name = f"{index}" if count == 1 else f"{index}-{index + count - 1}"
        table.add_row(name, layer.block, layer.mixer, *_layer_cells(layer))
        index += count
    table.add_section()
    table.add_row(
        "all",
        "",
        "",
        f"{cost.parameters:,}",
        f"{si(cost.flops_per_token)}FLOP",
        si_bytes(cost.state_bytes),
        si_bytes(cost.activation_bytes),
    )
    console = terminal()
    console.print(table)
    console.print(
        f"{cost.parameters:,} parameters ({si_bytes(cost.parameter_bytes)}), "
        f"{cost.body_parameters:,} of them outside embedding and output projection."
    )
    console.print(
        f"Recurrent state of one sequence after {cost.length:,} tokens: {cost.state_elements:,} elements, "
        f"{si_bytes(cost.state_bytes)}. Activations are what training keeps of one sequence of {cost.length:,} tokens."
    )
    per_step = config.training.batch_size * config.data.sequence_length
    tokens = per_step * config.training.steps
    console.print(
        f"Training: {config.training.steps:,} steps of {per_step:,} tokens, {si(tokens)}tokens in all, "
        f"about {si(3 * cost.flops_per_token * tokens)}FLOP."
    )


def _layer_cells(layer: LayerCost) -> tuple[str, ...]:
    return (
        f"{layer.parameters:,}",
        f"{si(layer.flops_per_token)}FLOP",
        si_bytes(layer.state_bytes),
        si_bytes(layer.activation_bytes),
    )


def si(number: float) -> str:
    """A number with a decimal prefix: 1.2 M."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(number) < 1000:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} Z"


def si_bytes(number: float) -> str:
    """A number of bytes with a binary prefix: 1.2 MiB."""
    for prefix in ("", "Ki", "Mi", "Gi"):
        if abs(number) < 1024:
            return f"{number:.4g} {prefix}B"
        number /= 1024
    return f"{number:.4g} TiB"
