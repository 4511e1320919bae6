"""A study's results, out of the folders of its runs."""

import json
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from ..registry import ConfigError
from ..registry.yaml_writer import write as to_yaml
from ..training import CheckpointError, read_config
from ..training.logging import METRICS_FILE
from ..training.provenance import SESSIONS_FILE
from .plan import Plan, PlannedEntry, PlannedRun
from .results import EntryResult, EvaluationPoint, Machine, PaperRow, Point, Results, RunResult, SpeedResult, SummaryRow
from .study import PaperFigure
from .summary import summarise

RUNS = "runs"
"""The folder of the runs in a study's."""
LARGEST_EXPONENT = 700.0
"""Of e, that a number can hold: perplexities of models that diverged are none."""


def collect(plan: Plan, folder: Path, *, failed: Mapping[str, str], speed: SpeedResult | None = None) -> Results:
    """What is there of a study.

    Args:
        plan: its runs.
        folder: where it was made.
        failed: why runs failed, by their names.
        speed: what was timed.
    """
    runs = [run_result(run, folder / RUNS / run.name, error=failed.get(run.name)) for run in plan.runs]
    summary = summarise(runs, plan.study.learning_rates)
    return Results(
        name=plan.name,
        question=plan.study.question,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=_machine(folder / RUNS / run.name for run in plan.runs),
        fairness=plan.fairness,
        entries=tuple(entry_result(entry) for entry in plan.entries),
        runs=tuple(runs),
        summary=tuple(summary),
        speed=speed or SpeedResult(),
        paper=tuple(_beside(figure, summary) for figure in plan.study.paper),
    )


def entry_result(entry: PlannedEntry) -> EntryResult:
    """What a model is and costs."""
    model = entry.config.model
    mixers = [model.blocks[name].mixer for name in model.layers]
    return EntryResult(
        name=entry.name,
        config=to_yaml(model.model_dump(mode="json")),
        mixers=tuple(dict.fromkeys(mixer.kind for mixer in mixers)),
        matched=None if entry.matched is None else str(entry.matched),
        **entry.cost._asdict(),
        state_grows=any(mixer.traits.state == "growing" for mixer in mixers),
    )


def is_finished(run: PlannedRun, folder: Path) -> bool:
    """Whether a folder has the whole of a run."""
    return any(line.get("final") and line["step"] == run.config.training.steps for line in _lines(folder))


def is_same(run: PlannedRun, folder: Path) -> bool:
    """Whether a folder is of this very run."""
    try:
        return read_config(folder) == run.config
    except (CheckpointError, ConfigError):
        return False


def run_result(run: PlannedRun, folder: Path, *, error: str | None = None) -> RunResult:
    """What a run's folder tells; `error` is why it failed."""
    lines = _lines(folder) if is_same(run, folder) else []
    logged = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "validation_loss" in line]
    final: dict[str, Any] = next((line for line in evaluated if line.get("final")), {})
    per_token = 3 * run.cost.flops_per_token

    def so_far(step: int) -> dict[str, Any]:
        tokens = step * run.tokens_per_step
        return {
            "step": step,
            "tokens": tokens,
            "flops": float(per_token * tokens),
            "seconds": _seconds(logged, step, run.tokens_per_step),
        }

    memory = [line["memory_bytes"] for line in logged if line.get("memory_bytes") is not None]
    speeds = [line["tokens_per_second"] for line in logged]
    return RunResult(
        name=run.name,
        entry=run.entry,
        seed=run.config.seed,
        learning_rate=run.config.training.learning_rate,
        variant=dict(run.variant),
        **run.cost._asdict(),
        status="finished" if final else "failed" if error is not None else "missing",
        error=None if final else error,
        seconds=_seconds(logged, logged[-1]["step"], run.tokens_per_step) if logged else None,
        tokens_per_second=median(speeds) if speeds else None,
        peak_memory_bytes=max(memory, default=None),
        validation_loss=final.get("validation_loss"),
        accuracy=final.get("accuracy"),
        accuracy_by=final.get("accuracy_by", {}),
        validation_loss_by_length=final.get("validation_loss_by_length", {}),
        history=tuple(Point(**so_far(line["step"]), loss=line["loss"]) for line in logged),
        evaluations=tuple(
            EvaluationPoint(
                **so_far(line["step"]), validation_loss=line["validation_loss"], accuracy=line.get("accuracy")
            )
            for line in evaluated
        ),
    )


def _seconds(logged: Iterable[Mapping[str, Any]], step: int, tokens: int) -> float:
    """Of the first steps, each as quick as the next one that was logged."""
    seconds, before, speed = 0.0, 0, None
    for line in logged:
        here, speed = min(line["step"], step), line["tokens_per_second"]
        seconds += (here - before) * tokens / speed
        before = here
        if here == step:
            break
    return seconds + ((step - before) * tokens / speed if speed else 0.0)


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The measurements of a run, but for lines that are damaged or cut short."""
    try:
        text = (folder / METRICS_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if _is_measurement(values):
            found.append(values)
    return found


def _is_measurement(values: Any) -> bool:
    """Whether a line has the finite numbers that every step, or every evaluation, writes."""
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        return False
    needed = ("validation_loss",) if "validation_loss" in values else ("loss", "tokens_per_second")
    numbers = [values.get(name) for name in needed]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
        return False
    return values.get("tokens_per_second", 1) > 0


def _machine(folders: Iterable[Path]) -> Machine:
    """What the first run that was begun was computed with."""
    for folder in folders:
        try:
            first = json.loads((folder / SESSIONS_FILE).read_text(encoding="utf-8").splitlines()[0])
            return Machine(**{name: first.get(name) for name in Machine.model_fields})
        except (OSError, ValueError, IndexError):
            continue
    return Machine()


def _beside(figure: PaperFigure, summary: Iterable[SummaryRow]) -> PaperRow:
    """A paper's figure and ours, of the first variant."""
    row = next((row for row in summary if row.entry == figure.entry), None)
    ours = None
    if row is not None and figure.ours == "accuracy":
        ours = row.accuracy and row.accuracy.mean
    elif row is not None:
        loss = row.validation_loss.mean
        ours = loss
        if figure.ours == "perplexity":
            ours = math.exp(loss) if loss < LARGEST_EXPONENT else None
    return PaperRow(label=figure.label, entry=figure.entry, theirs=figure.theirs, ours=ours)
