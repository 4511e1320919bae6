"""`seqmix schema`: print the JSON schema of a configuration, for editors."""

import json
from typing import Annotated

import typer

from ..experiments.study import Study
from ..registry import json_schema
from ..training import RunConfig


def schema(
    study: Annotated[
        bool, typer.Option("--study", help="Print the schema of a study file, for `seqmix compare`.")
    ] = False,
) -> None:
    """Print the JSON schema of a configuration, for YAML completion in editors."""
    typer.echo(json.dumps(json_schema(Study if study else RunConfig), indent=2))
