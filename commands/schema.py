"""`seqmix schema`: what editors complete YAML with."""

import json
from typing import Annotated

import typer

from ..experiments.study import Study
from ..registry import json_schema
from ..training import RunConfig


def schema(
    study: Annotated[bool, typer.Option("--study", help="That of a study, which `compare` reads.")] = False,
) -> None:
    """Print the JSON schema of a configuration, for editors that complete YAML."""
    typer.echo(json.dumps(json_schema(Study if study else RunConfig), indent=2))
