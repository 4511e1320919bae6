"""The tasks of the suite at small and at published settings, and the studies that they become."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ...mixers import MIXERS
from ...registry import Config, SeqmixError, dump, load, nearest, require_name, write_file
from ...registry.yaml import parse
from ...registry.yaml import write as to_yaml
from ...training import PRESETS, RunConfig, load_config
from ..match import cost_of
from ..plan import Plan, plan
from ..study import NAME_PATTERN, Name, OnceEach, Rate, Seed, StudyError, load_study

FOLDER = Path(__file__).parent
BASE_FILE = "base.yaml"
Size = Literal["small", "paper"]
Metric = Literal["parameters", "state"]
KNOBS: dict[Metric, tuple[str, float]] = {"parameters": ("blocks.*.ffn.expansion", 0.01), "state": ("d_model", 0.15)}
"""What makes models equal, and how far apart they may stay: heads divide widths, so states come in coarse steps."""


class Change(Config):
    """How one variation of a task differs from it."""

    model: dict[str, Any] = Field(default_factory=dict)
    """Changes of the task's model, as are those of its data and training."""
    data: dict[str, Any] = Field(default_factory=dict)
    training: dict[str, Any] = Field(default_factory=dict)


class SuiteTask(Config):
    """One task at one size."""

    measures: str
    """What it asks of a mixer, in a few words."""
    source: str
    """Where it was published."""
    differs: str | None = None
    """Where these settings are not the published ones."""
    chance: float = Field(gt=0, lt=1)
    """Accuracy of guessing."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Changes of the base's model."""
    data: dict[str, Any]
    """The task's data."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Changes of the base's training."""
    learning_rates: Annotated[tuple[Rate, ...], OnceEach] = Field(min_length=1)
    """The grid; its first one is taken where there is time for one alone."""
    score_at: tuple[str, ...] | None = None
    """Difficulties whose mean accuracy is the score; null for all that are evaluated."""
    changes: dict[Name, Change] = Field(default_factory=dict)
    """Variations, each a study of its own, called TASK+VARIATION: the task's score is the mean over it and them."""
    varies: str | None = None
    """Of a variation, the task."""


class SuiteSettings(Config):
    """All tasks at one size."""

    base: str
    """The file that all tasks start from, beside this one."""
    seeds: Annotated[tuple[Seed, ...], OnceEach] = Field(min_length=1)
    """A run of every entry each."""
    tasks: dict[Name, SuiteTask] = Field(min_length=1)
    """By name, most important first."""

    def chosen(self, names: Sequence[str]) -> dict[str, SuiteTask]:
        """The tasks with these names, in the suite's order; all where there are none.

        Raises:
            SeqmixError: there is no such task.
        """
        for name in names:
            require_name("task", name, list(self.tasks))
        return {
            each: variation
            for name, task in self.tasks.items()
            if name in names or not names
            for each, variation in {name: task, **_variations(name, task)}.items()
        }


def _variations(name: str, task: SuiteTask) -> dict[str, SuiteTask]:
    """The tasks that a task's changes make, by name."""
    return {
        f"{name}+{key}": task.model_copy(update={"varies": name, "changes": {key: task.changes[key]}})
        for key in task.changes
    }


def load_settings(size: Size) -> SuiteSettings:
    """The tasks at one size."""
    return load(SuiteSettings, FOLDER / f"{size}.yaml", presets=FOLDER)


@dataclass(frozen=True)
class Candidate:
    """What is measured: a mixer in the suite's own model, or the blocks of a configuration."""

    name: str
    mixer: dict[str, Any] | None = None
    """A kind, which has as many heads as the task's model, and options."""
    config: RunConfig | None = None
    source: str = ""
    """Of the configuration: a preset, or a file's absolute path."""

    @classmethod
    def of(cls, given: str) -> "Candidate":
        """What a command line names: a mixer's kind, a plug-in (module:Class), NAME={kind: ...}, a preset or a file.

        Raises:
            SeqmixError: it is none of them.
        """
        name, found, options = given.partition("=")
        if found:
            mixer = (node := parse(options, given)) and node.plain()
            if not isinstance(mixer, Mapping) or not isinstance(mixer.get("kind"), str):
                raise SeqmixError(f"{given!r} is not NAME={{kind: MIXER, ...}}")
            fields = MIXERS.resolve(mixer["kind"])
            known = [*fields.model_fields, *fields.deprecated_names]
            for key in mixer:
                if key not in known:
                    raise SeqmixError(
                        f"{given!r}: unknown key {key!r}; allowed: {', '.join(known)}{nearest(str(key), known)}"
                    )
            if not re.fullmatch(NAME_PATTERN, name):
                raise SeqmixError(f"{given!r}: a name has letters, digits and . _ + -, and was given {name!r}")
            return cls(name, dict(mixer))
        file = Path(given)
        if file.suffix in (".yaml", ".yml") or (given not in MIXERS.kinds() and (PRESETS / f"{given}.yaml").is_file()):
            return cls(file.stem, config=load_config(given), source=str(file.absolute()) if file.is_file() else given)
        MIXERS.resolve(given)
        return cls(given.rpartition(":")[2], {"kind": given})

    def entry(self, base: RunConfig) -> dict[str, Any]:
        """Its entry in a study of this base."""
        if self.config is not None:
            model = self.config.model
            # a pattern of many layers keeps each of its blocks once
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
    """How much of a size's settings is run."""

    steps: float = 1.0
    """Share of the steps."""
    one_rate: bool = False
    """Whether the first learning rate is taken alone."""
    one_seed: bool = False
    """Whether the first seed is taken alone."""


@dataclass(frozen=True)
class PlannedTask:
    """A task and its runs."""

    name: str
    task: SuiteTask
    plan: Plan
    left_out: Mapping[str, str]
    """Candidates that cannot be trained on it, and why."""


def write_studies(
    folder: Path,
    settings: SuiteSettings,
    tasks: Mapping[str, SuiteTask],
    candidates: Sequence[Candidate],
    match: Metric,
    extent: Extent,
    started: Callable[[str], object] = str,
) -> list[PlannedTask]:
    """Write each task's study and the base of it, folder/TASK/TASK.yaml and base.yaml, and plan it; `started` is given
    what is done now, in words, as models of equal cost are sought.

    What is matched is the cost of the task's own model, with attention, so that rows of other calls stand beside it.

    Raises:
        SeqmixError: no candidate can be trained on a task.
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
            "learning_rates": list(task.learning_rates[: 1 if extent.one_rate else None]),
        }
        planned.append(_plan(name, task, study, folder / name / f"{name}.yaml"))
    return planned


def base_of(settings: SuiteSettings, task: SuiteTask, extent: Extent) -> RunConfig:
    """What all entries of a task start from."""
    parts = {"model": task.model, "data": task.data, "training": task.training}.items()
    for change in task.changes.values() if task.varies else ():
        parts = [*parts, *change.model_dump().items()]
    changes = [f"{part}={to_yaml(value, in_one_line=True)}" for part, value in parts if value]
    config = load_config(FOLDER / settings.base, changes)
    if extent.steps == 1:
        return config
    steps = max(1, round(config.training.steps * extent.steps))
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})


def _plan(name: str, task: SuiteTask, study: dict[str, Any], file: Path) -> PlannedTask:
    """The study's plan, without the entries that make it impossible."""

    def planned(entries: Mapping[str, Any]) -> Plan:
        write_file(to_yaml(study | {"entries": dict(entries)}), file)
        return plan(load_study(file), file)

    entries = study["entries"]
    left_out = dict[str, str]()
    try:
        return PlannedTask(name, task, planned(entries), left_out)
    except SeqmixError:
        for entry, value in entries.items():
            try:
                planned({entry: value})
            except SeqmixError as error:
                left_out[entry] = str(error).replace(f"{file}: ", "")
    if len(left_out) == len(entries):
        raise StudyError(f"nothing can be trained on {name}: {next(iter(left_out.values()))}")
    return PlannedTask(name, task, planned({k: v for k, v in entries.items() if k not in left_out}), left_out)
