"""`seqmix schema`: print the JSON schema of a configuration, for editors, or of a command's result, for programs."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ...lab.study.study import Study
from ...registry import SeqmixError, json_schema
from ...training import RunConfig
from ..json_output import schema_of


@dataclass(frozen=True)
class SchemaResult:
    """Result of `seqmix schema`."""

    schema: dict[str, Any]
    """The JSON schema."""


def schema(
    study: Annotated[
        bool, typer.Option("--study", help="Print the schema of a study file, for `seqmix compare`.")
    ] = False,
    result: Annotated[
        str | None,
        typer.Option(help="Print the schema of what this command writes with --json.", metavar="COMMAND"),
    ] = None,
) -> SchemaResult:
    """Print the JSON schema of a configuration, for YAML completion in editors, or of a command's result."""
    if result is not None and study:
        raise SeqmixError("--study and --result are two schemas: leave one out")
    printed = json_schema(Study if study else RunConfig) if result is None else schema_of(result)
    typer.echo(json.dumps(printed, indent=2))
    return SchemaResult(printed)
