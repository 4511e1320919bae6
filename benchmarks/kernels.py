"""One kernel proved on a device: `python -m seqmix.benchmarks.kernels decay/chunkwise/triton cuda`.

Its conformance checks are run one by one and told as they end. Exit status 1: one failed; 2: it cannot be asked.
"""

from typing import Annotated

import typer

from ..mixers import Paradigm
from ..ops.kernels import KERNELS, find
from ..registry import SeqmixError, nearest
from ..testing import EXAMPLES, KERNEL_CHECKS, check_kernel
from ..testing.outcome import Status
from .program import run_program


def main(
    kernel: Annotated[str, typer.Argument(help="Op, paradigm and backend: decay/chunkwise/triton.")],
    device: Annotated[str, typer.Argument(help="Where it runs.")] = "cuda",
    examples: Annotated[int, typer.Option(help="Examples asked for.")] = EXAMPLES,
) -> None:
    """Prove what a kernel declares."""
    known = [str(key) for key in KERNELS]
    if kernel not in known:
        raise SeqmixError(f"there is no kernel {kernel!r}; kernels: {', '.join(known)}{nearest(kernel, known)}")
    op, paradigm, backend = kernel.split("/")
    statuses = set()
    for name in KERNEL_CHECKS:
        found = check_kernel(find(op, Paradigm(paradigm), backend), checks=[name], device=device, examples=examples)
        for outcome in found.outcomes:
            statuses.add(outcome.status)
            typer.echo(f"{outcome.status.value} {name}" + (f": {outcome.reason}" if outcome.reason else ""))
    if Status.FAILED in statuses:
        typer.echo(f"{kernel} breaks a promise")
        raise typer.Exit(1)


if __name__ == "__main__":
    run_program(main)
