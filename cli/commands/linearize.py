"""`seqmix linearize`: replace mixers of a trained model."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...lab.linearize import load_plan
from ...lab.linearize.linearization import Linearization, Prepared, Result, table
from ...lab.units import si_bytes
from ...models import account
from ...training.interrupt import StopRequest
from ..console import plain_table, terminal
from ..json_output import Ended
from ..options import DeviceOrGpu, require_device
from ..progress import follow


@dataclass(frozen=True)
class LinearizeResult:
    """Result of `seqmix linearize`."""

    run: str
    """The run directory of the new model."""
    comparison: Result | None
    """Comparison of the new model with its teacher, as in linearize.json; null for a dry run, and if interrupted."""


def linearize(
    source: Annotated[
        Path,
        typer.Argument(
            help="The teacher: a run directory, or a folder with config.json and *.safetensors of a model that `seqmix "
            "convert` supports, such as Llama or Qwen3.",
            metavar="SOURCE",
        ),
    ],
    plan: Annotated[
        Path, typer.Argument(help="YAML file with the mixers to replace and the training stages.", metavar="PLAN")
    ],
    out: Annotated[Path, typer.Option(help="Output folder.", metavar="DIR")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="For a model of another library: a tokenizer.json, or `bytes`; by default the model's own.",
            metavar="FILE",
        ),
    ] = None,
    device: DeviceOrGpu = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan with its costs, without training.")] = False,
) -> LinearizeResult | Ended[LinearizeResult]:
    """Replace mixers of a trained model as a plan says, and train the new ones to imitate the old ones.

    The output folder is a run directory, which generates, evaluates and exports like any other. Its linearize.json and
    linearize.md compare the new model with its teacher. Run the command again to continue after a stop.

    [bold]seqmix linearize runs/attention-tiny plan.yaml --out runs/linear[/bold]
    """
    if device is not None:
        require_device(device)
    console = terminal()
    linearization = Linearization(source, load_plan(plan), out, device=device, tokenizer=tokenizer)
    _show_plan(linearization, console)
    if dry_run:
        return LinearizeResult(str(out), None)
    _show_prepared(linearization.prepare(), console)
    for name in linearization.plan.staged:
        console.print(f"stage {name}")
        with StopRequest() as stop:
            events = linearization.stage(name, stop.was_made)
            finished = (
                events is None or follow(events, linearization.config(name).training, console).state == "finished"
            )
        if not finished:
            words = ["seqmix", "linearize", source, plan, "--out", out]
            console.print(f"stopped with a checkpoint; continue with: {shlex.join(map(str, words))}")
            return Ended(LinearizeResult(str(out), None), 130)
    result = linearization.finish()
    headers, rows = table(result)
    console.print(plain_table(*headers, rows=rows))
    console.print(f"{out} is a run directory; linearize.json and linearize.md in it compare it with its teacher")
    return LinearizeResult(str(out), result)


def _show_plan(linearization: Linearization, console: Console) -> None:
    """Print the layers with their parameters and states, and the stages."""
    length = linearization.run.data.sequence_length
    before = account(linearization.run.model, length=length)
    after = account(linearization.config().model, length=length)
    rows = []
    for i, (old, new) in enumerate(zip(before.layers, after.layers, strict=True)):
        counts = f"{old.mixer_parameters:,}", f"{new.mixer_parameters:,}"
        sizes = si_bytes(old.state_bytes), si_bytes(new.state_bytes)
        rows.append((f"{i}", old.mixer, new.mixer if i in linearization.swapped else "", *counts, *sizes))
    counts = f"{before.parameters:,}", f"{after.parameters:,}"
    rows.append(("all", "", "", *counts, si_bytes(before.state_bytes), si_bytes(after.state_bytes)))
    headers = ("layer", "mixer", "new mixer", "parameters", "new", f"state at {length:,}", "new")
    console.print(plain_table(*headers, rows=rows))
    if linearization.plan.keep is not None:
        console.print(f"the {linearization.plan.keep.best} layers whose swap costs most keep their mixer")
    stages = []
    for name, stage in linearization.plan.staged.items():
        steps = linearization.config(name).training.steps
        trained = linearization.trained(name)
        stages.append((name, f"{stage.tokens:,}", f"{steps:,}", f"{stage.learning_rate:g}", trained))
    if stages:
        console.print(plain_table("stage", "tokens", "steps", "learning rate", "trains", rows=stages))


def _show_prepared(prepared: Prepared, console: Console) -> None:
    """Print the cost of each swap, the weights that were transferred, and the losses."""
    for layer, cost in prepared.costs.items():
        kept = " (kept)" if int(layer) in prepared.kept else ""
        console.print(f"layer {layer}: swapping it alone costs {cost:.4f} nats/token{kept}")
    for transfer in prepared.taken:
        transferred = "; ".join(transfer.done) or "nothing transferred"
        console.print(f"layer {transfer.layer}, {transfer.old} to {transfer.new}: {transferred}")
        console.print(f"  newly initialised: {', '.join(transfer.initial) or 'nothing'}")
    console.print(
        f"loss of the teacher {prepared.teacher.loss:.4f}, with random mixers {prepared.start.loss:.4f}, transferred "
        f"{prepared.transferred.loss:.4f}"
    )
