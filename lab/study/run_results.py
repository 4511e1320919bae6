"""Results of a study, collected from the folders of its runs."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TypeVar

from ...data.corpus_config import CorpusConfig
from ...data.files import source_name
from ...registry import Config, ConfigError, read_bytes
from ...registry.yaml import write as to_yaml
from ...training import CheckpointError, RunConfig, read_config
from ...training.checkpoint.code import has_same_code
from ...training.checkpoint.provenance import SESSIONS_FILE
from ...training.checkpoint.run_dir import SCORES_FILE
from ...training.checkpoint.saved_run import modules_of
from ...training.monitoring.measurements import Measurement, read_measurements
from .config_differences import format_value
from .plan import Plan, PlannedEntry, PlannedRun
from .results import EntryResult, EvaluationPoint, Machine, PaperRow, Point, Results, RunResult, SpeedResult, SummaryRow
from .study import PaperFigure
from .summary import choose_rates, summarise, with_timed_speeds

C = TypeVar("C", bound=Config)
RUNS = "runs"
JOBS_FILE = "jobs.jsonl"
"""File in a study's folder with a JSON line per started run: its name, and how many runs trained at once."""
EVALUATED = ("validation_loss", "accuracy", "accuracy_by", "validation_loss_by", "validation_loss_by_length")
"""Fields of a run's result that come from its final evaluation."""
LARGEST_EXPONENT = 700.0
"""Largest loss (nats per token) whose perplexity exp(loss) fits into a float; models that diverged may exceed it."""


def collect_results(
    plan: Plan, folder: Path, *, failed: Mapping[str, str], speed: SpeedResult | None = None
) -> Results:
    """Collect the results of a study from its folder; `failed` maps names of failed runs to reasons."""
    plan = tuned(plan, folder, failed)
    at_once = _runs_at_once(folder / JOBS_FILE)
    runs = [
        run_result(run, folder / RUNS / run.name, error=failed.get(run.name), at_once=at_once.get(run.name))
        for run in plan.runs
    ]
    tune = plan.study.tune
    learned = plan.study.learned
    summary = summarise(runs, () if tune is None else tune.learning_rate, learned)
    results = Results(
        name=plan.name,
        question=plan.study.question,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=_machine(folder / RUNS / run.name for run in plan.runs),
        setup=setup(plan),
        fairness=plan.fairness,
        subject=plan.subject,
        margin=plan.study.margin,
        learned=learned,
        differences=plan.differences,
        entries=tuple(entry_result(entry) for entry in plan.entries),
        runs=tuple(runs),
        summary=tuple(summary),
        speed=speed or SpeedResult(),
        paper=tuple(_paper_row(figure, summary) for figure in plan.study.paper),
    )
    return with_timed_speeds(results)


def setup(plan: Plan) -> str:
    """Return data, optimizer, learning rate, schedule and length of training as text, of all entries and variants."""
    configs = list({run.group: run.config for run in plan.runs}.values())

    def distinct(text: Callable[[RunConfig], str]) -> str:
        return " / ".join(dict.fromkeys(map(text, configs)))

    tune = plan.study.tune
    rates = distinct(lambda config: f"{config.training.learning_rate:g}") + " (not tuned)"
    if tune is not None:
        rates = f"tuned over {', '.join(f'{rate:g}' for rate in tune.learning_rate)}"
    sizes = distinct(
        lambda config: (
            f"{config.training.steps:,} steps of {config.training.batch_size:,} sequences of "
            f"{config.data.sequence_length:,} tokens"
        )
    )
    parts = [
        f"data: {distinct(_data_text)}",
        f"optimizer: {distinct(lambda config: config.training.optimizer)}",
        f"learning rate: {rates}",
        f"schedule: {distinct(_schedule_text)}",
        f"training: {sizes}",
    ]
    return " · ".join(parts)


def _data_text(config: RunConfig) -> str:
    """Return the kind of data and its fields that are numbers or that are set, except for the sequence length.

    Of a text, also its source and its tokens.
    """
    data = config.data
    fields = data.model_dump(mode="json", exclude={"kind", "sequence_length"}, exclude_none=True)
    shown = {
        name: value
        for name, value in fields.items()
        if name in (*data.model_fields_set, "tokenizer") or _is_number(value)
    }
    texts = [f"{name} {format_value(value)}" for name, value in shown.items()]
    if isinstance(data, CorpusConfig) and not shown.keys() & {"paths", "dataset", "sources"}:
        texts.insert(0, source_name(data))
    return f"{data.kind} ({', '.join(texts)})" if texts else data.kind


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _schedule_text(config: RunConfig) -> str:
    warmup = config.training.warmup_steps
    return config.training.schedule + (f" (warmup_steps {warmup})" if warmup else "")


def tuned(plan: Plan, folder: Path, failed: Mapping[str, str]) -> Plan:
    """Return a plan with the learning rates that its tuning runs in a folder have chosen so far."""
    runs = [run_result(run, folder / RUNS / run.name, error=failed.get(run.name)) for run in plan.runs if run.tunes]
    return plan.with_rates(choose_rates(runs))


def entry_result(entry: PlannedEntry) -> EntryResult:
    """Return an entry as results.json has it: its model's configuration, mixers and costs."""
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
    """True if a folder contains this run, with the same configuration, trained to the end."""
    return bool(_final_evaluation(run, _measurements(folder))) and is_same(run, folder)


def is_same(run: PlannedRun, folder: Path) -> bool:
    """True if a folder contains a run with the same configuration and the same source of its plug-ins.

    No modules named in the folder are imported.
    """
    if run.awaits_learning_rate:
        return False
    try:
        # plug-ins of the study are imported already, so a folder that needs further modules is another run
        if modules_of(folder) or not has_same_code(folder, run.config):
            return False
        return read_config(folder) == run.config
    except (CheckpointError, ConfigError):
        return False


def run_result(run: PlannedRun, folder: Path, *, error: str | None = None, at_once: int | None = None) -> RunResult:
    """Read a run's result from its folder.

    Args:
        run: the planned run.
        folder: the folder of the run, which may not exist.
        error: the reason why the run failed; None if it did not.
        at_once: the largest number of the study's runs that trained at the same time, this one included; None if
            unknown.
    """
    lines = _measurements(folder) if is_same(run, folder) else []
    logged = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "validation_loss" in line]
    final = _final_evaluation(run, evaluated)
    speeds = [line["tokens_per_second"] for line in logged]
    speed = median(speeds) if speeds else None
    for line in lines:
        line["tokens"] = line["step"] * run.tokens_per_step
        line["flops"] = 3.0 * run.cost.flops_per_token * line["tokens"]
        # only logged steps are timed: one that stalled must not count for the steps around it
        line["seconds"] = line["tokens"] / speed if speed else 0.0
    memory = [line["memory_bytes"] for line in logged if line.get("memory_bytes") is not None]
    return RunResult(
        name=run.name,
        entry=run.entry,
        seed=run.config.seed,
        learning_rate=None if run.awaits_learning_rate else run.config.training.learning_rate,
        tunes=run.tunes,
        variant=dict(run.variant),
        precision=_session(folder).get("precision") if lines else None,
        sequence_length=run.config.data.sequence_length,
        alone=None if at_once is None else at_once == 1,
        **run.cost._asdict(),
        status="finished" if final else "failed" if error is not None else "missing",
        error=None if final else error,
        seconds=logged[-1]["seconds"] if logged else None,
        tokens_per_second=speed,
        tokens_per_second_range=(cuts[0], cuts[-1]) if (cuts := len(speeds) > 1 and quantiles(speeds)) else None,
        peak_memory_bytes=max(memory, default=None),
        **{name: final[name] for name in EVALUATED if name in final},
        scores=_scores(folder) if final else {},
        history=tuple(_from_line(Point, line) for line in logged),
        evaluations=tuple(_from_line(EvaluationPoint, line) for line in evaluated),
    )


def _scores(folder: Path) -> dict[str, dict[str, float]]:
    """Read the scores of lm-eval tasks from a run's folder, by task and metric; {} if the file is absent or invalid.

    Standard errors are left out: the spread of a study is that over seeds.
    """
    try:
        tasks = json.loads(read_bytes(folder / SCORES_FILE))
        return {t: {m: float(x) for m, x in each.items() if not m.endswith("_stderr")} for t, each in tasks.items()}
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, OverflowError):
        return {}


def _runs_at_once(file: Path) -> dict[str, int]:
    """Return, for each run listed in the jobs file, the largest number of runs that trained at the same time."""
    at_once: dict[str, int] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError, RecursionError):  # a truncated line
            job = json.loads(line)
            at_once[job["run"]] = max(at_once.get(job["run"], 0), job["at_once"])
    return at_once


def _from_line(kind: type[C], line: Mapping[str, Any]) -> C:
    """Build an object of a configuration class from a line's values of its fields; a field without a value is None."""
    return kind(**{name: line.get(name) for name in kind.model_fields})


def _measurements(folder: Path) -> list[Measurement]:
    """Read a run's measurements whose required numbers are all there and finite; [] if the file cannot be read."""
    try:
        return [line for line in read_measurements(folder) if _is_complete(line)]
    except OSError:
        return []


def _final_evaluation(run: PlannedRun, lines: Iterable[Measurement]) -> Measurement:
    """Return the final evaluation after all steps; {} if there is none.

    A run whose training.steps were raised has an earlier one too.
    """
    steps = run.config.training.steps
    return next((line for line in lines if line.get("final") and line["step"] == steps), {})


def _is_complete(line: Measurement) -> bool:
    needed = ("validation_loss",) if "validation_loss" in line else ("loss", "tokens_per_second")
    finite = all(isinstance(value := line.get(name), int | float) and math.isfinite(value) for name in needed)
    return finite and line.get("tokens_per_second", 1) > 0


def _machine(folders: Iterable[Path]) -> Machine:
    """Return the machine and versions in the record of the first run that has one; all None if no run has."""
    return next((_from_line(Machine, session) for folder in folders if (session := _session(folder))), Machine())


def _session(folder: Path) -> dict[str, Any]:
    """Return what a run's folder records of its first start: machine, precision and versions; {} without a record."""
    try:
        first = json.loads(read_bytes(folder / SESSIONS_FILE).splitlines()[0])
        Machine.model_validate({name: first.get(name) for name in Machine.model_fields})
        return first
    except (OSError, ValueError, IndexError, RecursionError, AttributeError):
        return {}


def _paper_row(figure: PaperFigure, summary: Iterable[SummaryRow]) -> PaperRow:
    """Return a number of a paper beside our measurement of the same entry, in the study's first variant."""
    row = next((row for row in summary if row.entry == figure.entry), None)
    statistic = row and (row.accuracy if figure.ours == "accuracy" else row.validation_loss)
    ours = statistic and statistic.mean
    if ours is not None and figure.ours == "perplexity":
        ours = math.exp(ours) if ours < LARGEST_EXPONENT else None
    return PaperRow(label=figure.label, entry=figure.entry, theirs=figure.theirs, ours=ours)
