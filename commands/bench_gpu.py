"""`seqmix bench-gpu`: everything that needs a GPU, in one command."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..benchmarks.gpu import GROUPS, measure, plan, run_process
from ..registry import SeqmixError, require_name


def bench_gpu(
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    only: Annotated[
        list[str] | None, typer.Option(help="Run only these parts; may be repeated.", metavar="|".join(GROUPS))
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Time limit per part, in seconds.")] = 600.0,
) -> None:
    """Run everything that needs a GPU: kernels, conformance, benchmarks, the paper's comparisons.

    Each part runs in its own process: a crash ends only that part. Finished parts are skipped when you run it again.

    [bold]seqmix bench-gpu --out gpu[/bold]
    """
    for name in only or ():
        require_name("part", name, GROUPS)
    if not torch.cuda.is_available():
        raise SeqmixError("bench-gpu needs a CUDA GPU, and torch finds none")
    memory = torch.cuda.get_device_properties(0).total_memory
    parts = [part for part in plan(memory) if not only or part.group in only]
    outcomes = measure(parts, out, lambda part, file: run_process(part, file, seconds=time_limit), typer.echo)
    for outcome in outcomes:
        if outcome.problem is not None:
            typer.echo(f"{outcome.part.group} {outcome.part.name}: {outcome.problem}")
    typer.echo(f"written: {out / 'gpu.json'} and {out / 'gpu.md'}")
