"""`seqmix bench-gpu`: all tests and benchmarks that need a GPU, in one command."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from ...lab.bench.gpu import measure
from ...lab.bench.gpu_plan import GROUPS, plan
from ...registry import SeqmixError, require_name
from ..json_output import Ended
from ..options import seconds_of


@dataclass(frozen=True)
class PartResult:
    """Outcome of one part; gpu.json has its figures."""

    group: str
    """Group of the part."""
    name: str
    """Name of the part."""
    problem: str | None
    """Why there are no figures; null if the part succeeded."""
    failed: bool
    """True if the part ran and failed; false if it was skipped or not started."""
    seconds: float
    """Seconds that it took."""


@dataclass(frozen=True)
class BenchGpuResult:
    """Result of `seqmix bench-gpu`."""

    out: str
    """Folder of the figures: gpu.json, gpu.md."""
    parts: list[PartResult]
    """All parts."""


def bench_gpu(
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    only: Annotated[
        list[str] | None, typer.Option(help="Run only these parts; may be repeated.", metavar="|".join(GROUPS))
    ] = None,
    time_limit: Annotated[
        str, typer.Option(help="Time limit of each part: 10m, or a number of seconds.", metavar="TIME")
    ] = "10m",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time budget of all parts together: 25m, or a number of seconds. The most important parts run first.",
            metavar="TIME",
        ),
    ] = None,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Run one part of each kind at toy sizes on the CPU, in five to ten minutes."),
    ] = False,
) -> BenchGpuResult | Ended[BenchGpuResult]:
    """Run all tests and benchmarks that need a GPU: kernels, conformance, speed, the paper's comparisons.

    Each part runs in its own process, so a crash ends only that part. Run the command again to continue: finished parts
    are skipped. An archive of the folder, DIR.tar.gz, is updated after each part. The exit status is 1 if a part
    failed.

    [bold]seqmix bench-gpu --out gpu --budget 25m[/bold]

    [bold]seqmix bench-gpu --out rehearsal --rehearse[/bold]
    """
    seconds = math.inf if budget is None else seconds_of("--budget", budget)
    limit = seconds_of("--time-limit", time_limit)
    for name in only or ():
        require_name("part", name, GROUPS)
    if rehearse:
        os.environ |= {"TRITON_INTERPRET": "1"}  # before triton is imported, here and in the parts
    elif not torch.cuda.is_available():
        raise SeqmixError("bench-gpu needs a CUDA GPU, but torch finds none: rehearse on the CPU with --rehearse")
    memory = 80 * 2**30 if rehearse else torch.cuda.get_device_properties(0).total_memory
    parts = [part for part in plan(memory, rehearsal=rehearse) if not only or part.group in only]
    outcomes = measure(parts, out, typer.echo, time_limit=limit, budget=seconds)
    for outcome in outcomes:
        if outcome.problem is not None:
            typer.echo(f"{outcome.part.group} {outcome.part.name}: {outcome.problem}")
    typer.echo(f"written: {out / 'gpu.json'}, {out / 'gpu.md'} and {out}.tar.gz")
    results = [
        PartResult(each.part.group, each.part.name, each.problem, each.failed, each.seconds) for each in outcomes
    ]
    result = BenchGpuResult(str(out), results)
    return Ended(result, 1) if any(outcome.failed for outcome in outcomes) else result
