"""The tasks of the suite, at small and at published settings, and their studies."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ...mixers import MIXERS
from ...registry import Config, SeqmixError, choices_hint, dump, load, require_name, write_file
from ...registry.yaml import parse
from ...registry.yaml import write as to_yaml
from ...training import PRESETS, RunConfig, load_config
from ..study.equal_cost import cost_of
from ..study.plan import Plan, plan
from ..study.study import NAME_PATTERN, Name, OnceEach, Rate, Seed, StudyError, load_study
from ..study.study_entries import require_options

FOLDER = Path(__file__).parent
BASE_FILE = "base.yaml"
Size = Literal["small", "paper"]
Metric = Literal["parameters", "state"]
KNOBS: dict[Metric, tuple[str, float]] = {"parameters": ("blocks.*.ffn.expansion", 0.01), "state": ("d_model", 0.15)}
"""Knob and tolerance of matching; the state's tolerance is wide because heads must divide widths."""


class Change(Config):
    """Changes to a task that make one variation of it."""

    model: dict[str, Any] = Field(default_factory=dict)
    """Changes to the task's model."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Changes to the task's data."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Changes to the task's training."""


class SuiteTask(Config):
    """A task of the suite at one size."""

    measures: str
    """Ability that the task measures, in a few words."""
    source: str
    """Publication of the task."""
    differs: str | None = None
    """Differences from the published settings; null for none."""
    chance: float = Field(gt=0, lt=1)
    """Accuracy of guessing."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Changes to the base's model."""
    data: dict[str, Any]
    """Data of the task."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Changes to the base's training."""
    learning_rates: Annotated[tuple[Rate, ...], OnceEach] = Field(min_length=1)
    """Learning rates of which the best is chosen for each mixer; without tuning, the first is used."""
    score_at: tuple[str, ...] | None = None
    """Difficulties whose mean accuracy is the score; null for all that are evaluated."""
    changes: dict[Name, Change] = Field(default_factory=dict)
    """Variations by name, each a study called TASK+VARIATION; the score is the mean over the task and all of them."""
    varies: str | None = None
    """Name of the task of which this is a variation; null if it is none."""


class SuiteSettings(Config):
    """All tasks of the suite at one size."""

    base: str
    """Configuration file beside the settings' file, which all tasks start from."""
    seeds: Annotated[tuple[Seed, ...], OnceEach] = Field(min_length=1)
    """Random seeds, each a run of every entry."""
    default_tasks: tuple[Name, ...] = ()
    """Tasks that are run unless others are named: those of the leaderboard; empty for all."""
    tasks: dict[Name, SuiteTask] = Field(min_length=1)
    """Tasks by name, most important first."""

    def chosen(self, names: Sequence[str]) -> dict[str, SuiteTask]:
        """Return the named tasks and their variations, in the suite's order.

        Args:
            names: names of tasks; `all` stands for all. If there is none, the default tasks are chosen.

        Raises:
            SeqmixError: there is no such task.
        """
        names = names or self.default_tasks or ("all",)
        for name in names:
            require_name("task", name, [*self.tasks, "all"])
        return {
            each: variation
            for name, task in self.tasks.items()
            if name in names or "all" in names
            for each, variation in {name: task, **_variations(name, task)}.items()
        }


def _variations(name: str, task: SuiteTask) -> dict[str, SuiteTask]:
    """Return the variations of a task by name."""
    return {
        f"{name}+{key}": task.model_copy(update={"varies": name, "changes": {key: task.changes[key]}})
        for key in task.changes
    }


def load_settings(size: Size) -> SuiteSettings:
    """Load the tasks at one size."""
    return load(SuiteSettings, FOLDER / f"{size}.yaml", presets=FOLDER)


@dataclass(frozen=True)
class Candidate:
    """Candidate for the suite: a mixer in the suite's own model, or the blocks of a configuration."""

    name: str
    mixer: dict[str, Any] | None = None
    """Kind and options of the mixer; without `n_heads`, it gets the heads of the task's model."""
    config: RunConfig | None = None
    source: str = ""
    """Source of the configuration: a preset, or the absolute path of a file."""

    @classmethod
    def of(cls, argument: str) -> "Candidate":
        """Parse a command-line argument: a mixer's kind, a plug-in (module:Class), NAME={kind: ...}, a preset, a file.

        Raises:
            SeqmixError: the argument is none of these.
        """
        name, equals_sign, options = argument.partition("=")
        if equals_sign:
            mixer = (node := parse(options, argument)) and node.plain()
            if not isinstance(mixer, Mapping) or not isinstance(mixer.get("kind"), str):
                raise SeqmixError(f"expected NAME={{kind: MIXER, ...}}, got {argument!r}")
            fields = MIXERS.resolve(mixer["kind"])
            known = [*fields.model_fields, *fields.deprecated_names]
            for key in mixer:
                if key not in known:
                    raise SeqmixError(f"{argument!r}: unknown key {key!r}{choices_hint(str(key), known)}")
            if not re.fullmatch(NAME_PATTERN, name):
                raise SeqmixError(f"{argument!r}: expected a name of letters, digits and . _ + -, got {name!r}")
            return cls(name, dict(mixer))
        file = Path(argument)
        is_preset = argument not in MIXERS.kinds() and (PRESETS / f"{argument}.yaml").is_file()
        if file.suffix in (".yaml", ".yml") or is_preset:
            source = str(file.absolute()) if file.is_file() else argument
            return cls(file.stem, config=load_config(argument), source=source)
        MIXERS.resolve(argument)
        return cls(argument.rpartition(":")[2], {"kind": argument})

    def entry(self, base: RunConfig) -> dict[str, Any]:
        """Return the candidate as an entry of a study whose base is `base`."""
        if self.config is not None:
            model = self.config.model
            # the small model has each block of the pattern once
            pattern = list(dict.fromkeys(model.layers))
            layers = max(base.model.n_layers, len(pattern))
            return {
                "extends": self.source,
                "model": {"d_model": base.model.d_model, "n_layers": layers, "pattern": pattern},
            }
        mixer = self.mixer or {}
        heads = getattr(base.model.blocks["mixer"].mixer, "n_heads", None)
        if "n_heads" in MIXERS.resolve(mixer["kind"]).model_fields:
            mixer = {"kind": mixer["kind"], "n_heads": heads} | mixer
        return {"set": {"model.blocks.mixer.mixer": mixer}}


@dataclass(frozen=True)
class Extent:
    """Extent to which each task is run: a share of its steps, with or without tuning, with all or one of its seeds."""

    steps: float = 1.0
    """Share of the training steps, from 0 to 1."""
    one_rate: bool = False
    """True to use the first learning rate without tuning."""
    one_seed: bool = False
    """True to use only the first seed."""


@dataclass(frozen=True)
class PlannedTask:
    """A task with its planned runs."""

    name: str
    task: SuiteTask
    plan: Plan
    left_out: Mapping[str, str]
    """Reasons for candidates that cannot be trained on the task, by name."""


def write_studies(
    folder: Path,
    settings: SuiteSettings,
    tasks: Mapping[str, SuiteTask],
    candidates: Sequence[Candidate],
    match: Metric,
    extent: Extent,
    started: Callable[[str], object] = str,
    *,
    equal: Mapping[str, Any] | None = None,
    subject: str | None = None,
) -> list[PlannedTask]:
    """Write each task's study (folder/TASK/TASK.yaml and its base.yaml), and plan it.

    Every candidate is matched to the cost of the task's own model, which has attention, so that rows of different calls
    are comparable. `started` is called with a line when the planning of a task starts. `equal` has options that are
    equal in all mixers; `subject` is the candidate that the reports begin with.

    Raises:
        SeqmixError: no candidate can be trained on a task, or none has an option that is to be equal.
    """
    planned = []
    for number, (name, task) in enumerate(tasks.items(), 1):
        started(f"planning {len(candidates)} models of equal {match} for {name}, task {number} of {len(tasks)}")
        base = base_of(settings, task, extent)
        write_file(dump(base), folder / name / BASE_FILE)
        knob, tolerance = KNOBS[match]
        wanted = cost_of(base.model, match, base.data.sequence_length)
        study: dict[str, Any] = {
            "question": f"{task.measures[:1].upper()}{task.measures[1:]} ({task.source})",
            "base": BASE_FILE,
            "entries": {each.name: each.entry(base) for each in candidates},
            "match": {match: wanted, "knob": knob, "tolerance": tolerance},
            "seeds": list(settings.seeds[: 1 if extent.one_seed else None]),
            "equal": dict(equal or {}),
        }
        if not extent.one_rate and len(task.learning_rates) > 1:
            study["tune"] = {"learning_rate": list(task.learning_rates)}
        if subject is not None:
            study["subject"] = subject
        planned.append(_plan(name, task, study, folder / name / f"{name}.yaml"))
        require_options({option: f"--equal {option}: " for option in equal or {}}, planned[-1].plan.entries)
    return planned


def base_of(settings: SuiteSettings, task: SuiteTask, extent: Extent) -> RunConfig:
    """Return the configuration that all entries of a task start from, with the steps of the extent."""
    parts = {"model": task.model, "data": task.data, "training": task.training}.items()
    for change in task.changes.values() if task.varies else ():
        parts = [*parts, *change.model_dump().items()]
    changes = [f"{part}={to_yaml(value, in_one_line=True)}" for part, value in parts if value]
    changes.append(f"training.learning_rate={task.learning_rates[0]}")
    config = load_config(FOLDER / settings.base, changes)
    if extent.steps == 1:
        return config
    steps = max(1, round(config.training.steps * extent.steps))
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})


def _plan(name: str, task: SuiteTask, study: dict[str, Any], file: Path) -> PlannedTask:
    """Plan a task's study without the entries that cannot be planned."""

    def plan_entries(entries: Mapping[str, Any]) -> Plan:
        values = study | {"entries": dict(entries)}
        if values.get("subject") not in entries:
            values.pop("subject", None)  # it cannot be trained on this task
        write_file(to_yaml(values), file)
        return plan(load_study(file), file, require_equal=False)

    entries = study["entries"]
    left_out = dict[str, str]()
    try:
        return PlannedTask(name, task, plan_entries(entries), left_out)
    except SeqmixError:
        for entry, value in entries.items():
            try:
                plan_entries({entry: value})
            except SeqmixError as error:
                left_out[entry] = str(error).replace(f"{file}: ", "")
    if len(left_out) == len(entries):
        raise StudyError(f"no mixer can be trained on {name}: {next(iter(left_out.values()))}")
    return PlannedTask(name, task, plan_entries({k: v for k, v in entries.items() if k not in left_out}), left_out)
