"""`seqmix train`: start a run, or resume one."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from ...data.files import MissingDataError
from ...models import ModelCost
from ...registry import SeqmixError
from ...registry.loading import origin_of
from ...training import PRESETS, RunConfig, load_config, read_config, read_status
from ...training.checkpoint.files import checkpoints
from ...training.checkpoint.run_dir import CONFIG_FILE
from ...training.monitoring.memory import keep_freed_memory
from ..console import note
from ..json_output import Ended
from ..options import DeviceOrGpu, Overrides, Trust, require_device, seconds_of
from ..progress import run_with_progress
from .show import print_cost


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Result of `seqmix train`."""

    run: str
    """Run directory."""
    checkpoint: str | None
    """Folder of the newest checkpoint; null if there is none."""
    state: Literal["finished", "stopped", "interrupted"]
    """`finished`, after all steps or by early stopping; `stopped`, at its time budget; `interrupted`, by a signal."""
    reason: str
    """Why the run ended, in one sentence."""
    step: int
    """Number of steps completed."""
    steps: int
    """Number of steps of the configuration."""
    loss: float | None
    """Loss of the last step, in nats per token."""
    validation_loss: float | None
    """Validation loss of the last evaluation, in nats per token."""


@dataclass(frozen=True)
class DryRun:
    """Result of `seqmix train --dry-run`."""

    cost: ModelCost
    """Cost of the model."""


def train(
    config: Annotated[
        str | None, typer.Argument(help="A preset (retnet-tiny) or a YAML file.", metavar="CONFIG")
    ] = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; runs/NAME by default.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Resume this run from its newest checkpoint.", metavar="RUN")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time budget, the same as training.max_time: 30m, 1h30m, or a number of seconds. At its end training "
            "stops with an evaluation and a checkpoint.",
            metavar="TIME",
        ),
    ] = None,
    trust: Trust = False,
    device: DeviceOrGpu = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate the configuration and show the model's cost, without training.")
    ] = False,
) -> TrainResult | Ended[TrainResult | None] | DryRun | None:
    """Train a model from a preset or a YAML file, or resume a run.

    Training writes config.yaml, metrics.jsonl and checkpoints to the run directory, runs/NAME by default. Without
    data.paths, the training data is the source code of Python's standard library. Ctrl-C stops after the current step,
    with a checkpoint.

    [bold]seqmix train retnet-tiny[/bold]

    [bold]seqmix train retnet-tiny training.steps=200 --out runs/short[/bold]

    [bold]seqmix train retnet-tiny --budget 10m[/bold]

    [bold]seqmix train --resume runs/retnet-tiny[/bold]

    [bold]torchrun --nproc-per-node 8 -m seqmix train retnet-1.3b distributed.context_parallel=2[/bold]
    """
    limit = [] if budget is None else [f"training.max_time={seconds_of('--budget', budget)}"]
    if resume is not None:
        changes = [*([] if config is None else [config]), *(overrides or [])]
        if out is not None or dry_run or not all(change.startswith("distributed.") for change in changes):
            raise SeqmixError(
                "--resume takes no CONFIG, overrides or options, except --budget and (for another number of processes) "
                f"distributed.KEY=VALUE: it uses {resume}/config.yaml, which you may edit"
            )
        loaded = read_config(resume, [*changes, *limit], on_note=note, trust=trust)
        run = resume
    elif config is None:
        raise SeqmixError("train needs a CONFIG (a preset such as retnet-tiny, or a YAML file) or --resume RUN")
    else:
        loaded = load_config(config, [*(overrides or []), *limit])
        run = out or Path("runs") / Path(config).name.removesuffix(".yaml").removesuffix(".yml")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and (run / CONFIG_FILE).is_file():
        loaded = read_config(run, on_note=note, trust=trust) if resume is None else loaded
        resume = run  # restarted by torchrun --max-restarts
    if dry_run:
        loaded.data.require_files(loaded.model.vocab_size)
        return DryRun(print_cost(loaded))
    if device is not None:
        require_device(device)
    keep_freed_memory()
    try:
        ended = run_with_progress(loaded, run, resume=resume is not None, device=device)
    except MissingDataError as error:
        source = config if resume is None else resume / CONFIG_FILE
        origin = origin_of(RunConfig, source, overrides or [], "data.paths", presets=PRESETS)
        raise MissingDataError(f"{origin}: {error}") from None
    result = _result_of(run, ended.state) if os.environ.get("RANK", "0") == "0" else None
    # 130 is the shell's status of an interrupted command, so that `train && generate` stops
    return Ended(result, 130) if ended.state == "interrupted" else result


def _result_of(run: Path, state: Literal["finished", "stopped", "interrupted"]) -> TrainResult:
    """Return the result of a run that has ended in a state."""
    status = read_status(run)
    newest = checkpoints(run)[-1:]
    return TrainResult(
        run=str(run),
        checkpoint=str(newest[0]) if newest else None,
        state=state,
        reason=status.reason,
        step=status.step,
        steps=status.steps,
        loss=status.loss,
        validation_loss=status.validation_loss,
    )
