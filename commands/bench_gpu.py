"""`seqmix bench-gpu`: what a machine with a GPU is asked in one go."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..benchmarks.gpu import GROUPS, measure, plan, run_process
from ..registry import SeqmixError, require_name


def bench_gpu(
    out: Annotated[Path, typer.Option(help="The folder that figures are written to.")],
    only: Annotated[list[str] | None, typer.Option(help="Run these parts alone.", metavar="|".join(GROUPS))] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds a part may take.")] = 600.0,
) -> None:
    """Measure all that a GPU is needed for: kernels, conformance, benchmarks, the paper's comparisons.

    Every part runs in a process of its own; a crash loses nothing else, and what was measured is not measured again.

    [bold]seqmix bench-gpu --out gpu[/bold]
    """
    for name in only or ():
        require_name("part", name, GROUPS)
    if not torch.cuda.is_available():
        raise SeqmixError("this measures on a GPU, and torch finds none")
    memory = torch.cuda.get_device_properties(0).total_memory
    parts = [part for part in plan(memory) if not only or part.group in only]
    outcomes = measure(parts, out, lambda part, file: run_process(part, file, seconds=time_limit), typer.echo)
    for outcome in outcomes:
        if outcome.problem is not None:
            typer.echo(f"{outcome.part.group} {outcome.part.name}: {outcome.problem}")
    typer.echo(f"written: {out / 'gpu.json'} and {out / 'gpu.md'}")
