"""`seqmix linearize`: a trained model with other mixers."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..linearize import load_plan
from ..linearize.course import Linearization, Prepared, table
from ..models import account
from ..training.interrupt import StopRequest
from .console import plain_table, terminal
from .options import DeviceOrGpu, require_device
from .progress import follow
from .show import si_bytes


def linearize(
    source: Annotated[
        Path,
        typer.Argument(
            help="A run directory, or a folder with config.json and *.safetensors of a model that `seqmix convert` "
            "reads, such as Llama or Qwen3.",
            metavar="SOURCE",
        ),
    ],
    plan: Annotated[Path, typer.Argument(help="What is swapped, and the stages: a YAML file.", metavar="PLAN")],
    out: Annotated[Path, typer.Option(help="The folder of the result.", metavar="DIR")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Of another library's model: a tokenizer.json, or bytes; by default its own.", metavar="FILE"
        ),
    ] = None,
    device: DeviceOrGpu = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan with its costs, without training.")] = False,
) -> None:
    """Swap mixers of a trained model by a plan, and teach the new ones what the old ones did.

    The folder becomes a run directory, which generates, evaluates and exports as any other; linearize.json and
    linearize.md compare it with its teacher. Run the command again to continue after a stop.

    [bold]seqmix linearize runs/attention-tiny plan.yaml --out runs/linear[/bold]
    """
    if device is not None:
        require_device(device)
    console = terminal()
    work = Linearization(source, load_plan(plan), out, device=device, tokenizer=tokenizer)
    _show_plan(work, console)
    if dry_run:
        return
    _show_prepared(work.prepare(), console)
    for name in work.plan.staged:
        console.print(f"stage {name}")
        with StopRequest() as stop:
            events = work.stage(name, stop.made)
            finished = events is None or follow(events, work.config(name).training, console)[0]
        if not finished:
            words = ["seqmix", "linearize", source, plan, "--out", out]
            console.print(f"stopped with a checkpoint; continue with: {shlex.join(map(str, words))}")
            raise typer.Exit(130)
    head, rows = table(work.finish())
    console.print(plain_table(*head, rows=rows))
    console.print(f"{out} is a run directory, and has linearize.json and linearize.md")


def _show_plan(work: Linearization, console: Console) -> None:
    """Layers with their parameters and states, and the stages."""
    size = work.run.data.sequence_length
    before = account(work.run.model, length=size)
    after = account(work.config().model, length=size)
    rows = []
    for i, (old, new) in enumerate(zip(before.layers, after.layers, strict=True)):
        counts = f"{old.mixer_parameters:,}", f"{new.mixer_parameters:,}"
        sizes = si_bytes(old.state_bytes), si_bytes(new.state_bytes)
        rows.append((f"{i}", old.mixer, new.mixer if i in work.swapped else "", *counts, *sizes))
    counts = f"{before.parameters:,}", f"{after.parameters:,}"
    rows.append(("all", "", "", *counts, si_bytes(before.state_bytes), si_bytes(after.state_bytes)))
    heads = ("layer", "mixer", "new mixer", "parameters", "new", f"state at {size:,}", "new")
    console.print(plain_table(*heads, rows=rows))
    if work.plan.keep is not None:
        console.print(f"the {work.plan.keep.best} layers whose swap costs most keep their mixer")
    stages = []
    for name, stage in work.plan.staged.items():
        config = work.config(name).training
        stages.append((name, f"{stage.tokens:,}", f"{config.steps:,}", f"{stage.learning_rate:g}", work.trained(name)))
    if stages:
        console.print(plain_table("stage", "tokens", "steps", "learning rate", "trains", rows=stages))


def _show_prepared(found: Prepared, console: Console) -> None:
    """What was taken over, and what swaps cost."""
    for layer, cost in found.costs.items():
        kept = " (kept)" if int(layer) in found.kept else ""
        console.print(f"layer {layer}: its swap alone costs {cost:.4f} nats/token{kept}")
    for taken in found.taken:
        done = "; ".join(taken.done) or "nothing taken over"
        console.print(f"layer {taken.layer}, {taken.old} to {taken.new}: {done}")
        console.print(f"  initialised: {', '.join(taken.initial) or 'nothing'}")
    losses = found.teacher.loss, found.start.loss, found.transferred.loss
    console.print("loss of the teacher {:.4f}, with random mixers {:.4f}, transferred {:.4f}".format(*losses))
