"""`seqmix vectors`: write conformance vectors for other implementations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..output import visible


@dataclass(frozen=True)
class VectorsResult:
    """Result of `seqmix vectors`."""

    folder: str
    """The folder that was written."""
    cases: int
    """Number of cases."""


def vectors(
    folder: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.", metavar="OUT")],
    families: Annotated[
        str | None,
        typer.Option(
            help="Families to write, separated by commas; all by default.", metavar="NAME,...", show_default=False
        ),
    ] = None,
) -> VectorsResult:
    """Write conformance vectors: inputs, expected outputs, states and gradients of every op, for any implementation.

    The folder gets an index (index.json, with its schema), one safetensors file per family, and a runner that needs
    numpy and safetensors only. The expected numbers are those of each op's definition, token by token in float64.

    [bold]seqmix vectors vectors/[/bold]

    [bold]python vectors/runner.py my_implementation.py[/bold]
    """
    from ...testing.vectors.write import write_vectors

    names = () if families is None else tuple(families.replace(",", " ").split()) or (families,)
    number = write_vectors(folder, names)
    typer.echo(visible(f"{folder} has {number} cases: test an implementation with python {folder}/runner.py FILE.py"))
    return VectorsResult(str(folder), number)
