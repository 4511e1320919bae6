"""`seqmix plan`: estimate the cost of a training step on many GPUs, by layout."""

import shlex
from dataclasses import dataclass
from typing import Annotated

import typer

from ...lab.units import si_bytes
from ...registry import require_name
from ...training import load_config
from ...training.distributed.layouts import GPUS, GPUS_PER_MACHINE, PEAK_FRACTION, Layout, Planner
from ..console import plain_table, terminal
from ..options import Overrides

MAX_LAYOUTS = 8
"""Maximum number of layouts in the table."""
COLUMNS = "data", "shard", "context", "micro-batches", "memory", "received", "copies", "computing", "sending", "step"


@dataclass(frozen=True)
class PlanResult:
    """Result of `seqmix plan`."""

    gpu: str
    """Kind of GPU."""
    gpus: int
    """Number of GPUs."""
    layouts: list[Layout]
    """All layouts, the fastest that fit first."""
    overrides: list[str] | None
    """Overrides of the configuration that set the first layout; null if none fits."""


def plan(
    config: Annotated[str, typer.Argument(help="A preset (retnet-6.7b) or a YAML file.", metavar="CONFIG")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs, in machines of 8.", min=1, max=2**16)] = 8,
    gpu: Annotated[str, typer.Option(help="Kind of GPU.", metavar="|".join(GPUS))] = "h100",
) -> PlanResult:
    """Estimate memory, traffic and time of a training step on many GPUs, by layout, without running it.

    Every layout has the fewest micro-batches that fit into memory. The fastest layouts that fit come first.

    [bold]seqmix plan retnet-6.7b --gpus 64[/bold]
    """
    require_name("GPU", gpu, GPUS)
    run = load_config(config, overrides or [])
    planner = Planner(run, gpu)
    layouts = planner.layouts(gpus)
    console = terminal()
    console.print(plain_table(*COLUMNS, rows=[_cells(layout) for layout in layouts[:MAX_LAYOUTS]], justify="right"))
    if not layouts[0].fits:
        console.print(f"No layout fits into {si_bytes(planner.gpu.memory)}: shorten the sequences, or use more GPUs.")
    else:
        best = layouts[0].overrides
        names = {change.partition("=")[0] for change in best}
        others = [change for change in overrides or [] if change.partition("=")[0] not in names]
        console.print(f"To use the first layout: {shlex.join([config, *others, *best])}")
    tokens = run.training.batch_size * run.data.sequence_length
    links = planner.gpu
    dtype = str(planner.dtype).removeprefix("torch.")
    console.print(
        "Per GPU. Received (within a replica) and copies (between replicas): bytes per micro-batch. Computing, sending "
        f"and step: seconds per step of {tokens:,} tokens. A step takes the larger of computing and sending at best, "
        f"and their sum at worst. Assumed, not measured: {PEAK_FRACTION:.0%} of the peak rate in {dtype}, "
        f"{si_bytes(links.rate_within_machine)}/s between the {GPUS_PER_MACHINE} GPUs of a machine, "
        f"{si_bytes(links.rate_between_machines)}/s between machines."
    )
    return PlanResult(gpu, gpus, layouts, layouts[0].overrides if layouts[0].fits else None)


def _cells(layout: Layout) -> list[str]:
    best, worst = layout.seconds
    return [
        str(layout.data),
        str(layout.shard),
        str(layout.context_parallel),
        str(layout.grad_accum_steps),
        si_bytes(layout.memory) + ("" if layout.fits else " (too much)"),
        si_bytes(layout.received),
        si_bytes(layout.copied),
        f"{layout.computing:.3g}",
        f"{layout.sending:.3g}",
        f"{best:.3g} - {worst:.3g}",
    ]
