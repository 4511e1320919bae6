"""A study's results, out of the folders of its runs."""

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeVar

from ..registry import Config, ConfigError, read_bytes
from ..registry.yaml import write as to_yaml
from ..training import CheckpointError, read_config
from ..training.checkpoint.provenance import SESSIONS_FILE
from ..training.checkpoint.run_dir import SCORES_FILE
from ..training.checkpoint.saved_run import modules_of
from .measurements import Measurement, add_time, read_measurements
from .plan import Plan, PlannedEntry, PlannedRun
from .results import EntryResult, EvaluationPoint, Machine, PaperRow, Point, Results, RunResult, SpeedResult, SummaryRow
from .study import PaperFigure
from .summary import summarise

C = TypeVar("C", bound=Config)
RUNS = "runs"
JOBS_FILE = "jobs.jsonl"
"""In a study's folder: that of the runs, and a line for each process that made one: how many ran at once."""
EVALUATED = ("validation_loss", "accuracy", "accuracy_by", "validation_loss_by", "validation_loss_by_length")
"""What of a run is that of its final evaluation."""
LARGEST_EXPONENT = 700.0
"""Of e, that a number can hold: perplexities of models that diverged are none."""


def collect(plan: Plan, folder: Path, *, failed: Mapping[str, str], speed: SpeedResult | None = None) -> Results:
    """What was found by a study in its folder; `failed` says why runs failed, by their names."""
    crowds = _at_once(folder / JOBS_FILE)
    runs = [
        run_result(run, folder / RUNS / run.name, error=failed.get(run.name), at_once=crowds.get(run.name))
        for run in plan.runs
    ]
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
    """Whether a folder has the whole of this very run."""
    ends = [line["step"] for line in _measurements(folder) if line.get("final")]
    return run.config.training.steps in ends and is_same(run, folder)


def is_same(run: PlannedRun, folder: Path) -> bool:
    """Whether a folder is of this very run."""
    try:
        # the modules of the run itself are imported by now
        return not modules_of(folder) and read_config(folder) == run.config
    except (CheckpointError, ConfigError):
        return False


def run_result(run: PlannedRun, folder: Path, *, error: str | None = None, at_once: int | None = None) -> RunResult:
    """What a run's folder holds; `error` is why it failed, `at_once` how many runs shared the machine at most."""
    lines = _measurements(folder) if is_same(run, folder) else []
    add_time(lines, run.tokens_per_step)
    logged = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "validation_loss" in line]
    final: Measurement = next((line for line in evaluated if line.get("final")), {})
    for line in lines:
        line["flops"] = 3.0 * run.cost.flops_per_token * line["tokens"]
    speeds = [line["tokens_per_second"] for line in logged]
    memory = [line["memory_bytes"] for line in logged if line.get("memory_bytes") is not None]
    return RunResult(
        name=run.name,
        entry=run.entry,
        seed=run.config.seed,
        learning_rate=run.config.training.learning_rate,
        variant=dict(run.variant),
        sequence_length=run.config.data.sequence_length,
        alone=None if at_once is None else at_once == 1,
        **run.cost._asdict(),
        status="finished" if final else "failed" if error is not None else "missing",
        error=None if final else error,
        seconds=logged[-1]["seconds"] if logged else None,
        tokens_per_second=median(speeds) if speeds else None,
        tokens_per_second_range=(cuts[0], cuts[-1]) if (cuts := len(speeds) > 1 and quantiles(speeds)) else None,
        peak_memory_bytes=max(memory, default=None),
        **{name: final[name] for name in EVALUATED if name in final},
        scores=_scores(folder) if final else {},
        history=tuple(_of(Point, line) for line in logged),
        evaluations=tuple(_of(EvaluationPoint, line) for line in evaluated),
    )


def _scores(folder: Path) -> dict[str, dict[str, float]]:
    """The scores of lm-eval's tasks in a run's folder, without standard errors: seeds have a spread."""
    try:
        found = json.loads(read_bytes(folder / SCORES_FILE))
        return {t: {m: float(x) for m, x in each.items() if not m.endswith("_stderr")} for t, each in found.items()}
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, OverflowError):  # absent, or something else
        return {}


def _at_once(file: Path) -> dict[str, int]:
    """By run, how many ran at once at most, of those whose processes are known."""
    found: dict[str, int] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError, RecursionError):  # a line that is cut short
            made = json.loads(line)
            found[made["run"]] = max(found.get(made["run"], 0), made["at_once"])
    return found


def _of(kind: type[C], line: Mapping[str, Any]) -> C:
    """What a line has of a kind's fields."""
    return kind(**{name: line.get(name) for name in kind.model_fields})


def _measurements(folder: Path) -> list[Measurement]:
    """Lines with the finite numbers that every step, or every evaluation, writes."""
    try:
        return [line for line in read_measurements(folder) if _is_whole(line)]
    except OSError:
        return []


def _is_whole(line: Measurement) -> bool:
    needed = ("validation_loss",) if "validation_loss" in line else ("loss", "tokens_per_second")
    finite = all(isinstance(value := line.get(name), int | float) and math.isfinite(value) for name in needed)
    return finite and line.get("tokens_per_second", 1) > 0


def _machine(folders: Iterable[Path]) -> Machine:
    """What the first run that was begun was computed with."""
    for folder in folders:
        try:
            first = json.loads(read_bytes(folder / SESSIONS_FILE).splitlines()[0])
            return _of(Machine, first)
        except (OSError, ValueError, IndexError, RecursionError, AttributeError):
            continue
    return Machine()


def _beside(figure: PaperFigure, summary: Iterable[SummaryRow]) -> PaperRow:
    """A paper's figure and ours, of the first variant."""
    row = next((row for row in summary if row.entry == figure.entry), None)
    found = row and (row.accuracy if figure.ours == "accuracy" else row.validation_loss)
    ours = found and found.mean
    if ours is not None and figure.ours == "perplexity":
        ours = math.exp(ours) if ours < LARGEST_EXPONENT else None
    return PaperRow(label=figure.label, entry=figure.entry, theirs=figure.theirs, ours=ours)
