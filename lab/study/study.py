"""The configuration of a study, one YAML file: models that are trained under identical conditions and compared.

question: Which mixers recall?
base: retnet-tiny                       # a preset or a file: model, data and training of all entries
mixers: [retention, attention]          # entries that differ only in their mixer
entries:                                # entries with other changes
  hybrid: {extends: hybrid-tiny}
subject: retention                      # the entry that the report's first sentence is about
margin: 0.05                            # a difference up to this size does not matter
match: {parameters: retention, knob: blocks.*.ffn.expansion}
equal: {short_conv: 4}                  # options set to the same value in all mixers
tune: {learning_rate: [1.0e-3, 3.0e-3]}
seeds: [0, 1, 2]
"""

import math
import warnings
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from ...registry import Config, DataError, SeqmixError, choices_hint, load, nearest_hint
from ...registry.config import deprecation
from ...registry.errors import shown
from ..statistics.learned import LEARNED
from .config_differences import leaves
from .equal_cost import Match

STUDIES = Path(__file__).parents[1] / "studies"
"""The folder of the studies that come with the package."""
EQUAL_TRAINING_FIELDS = (
    "steps",
    "batch_size",
    "evaluate_every",
    "evaluation_batches",
    "final_evaluation_batches",
    "evaluation_lengths",
    "patience",
    "carry_state",
)
"""Fields of `training` that determine the batches and the evaluation, and so must be equal for all entries."""


def _require_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(map(repr, values))) < len(values):
        raise ValueError(f"expected each value once, got {list(values)}: remove the duplicates")
    return values


OnceEach = AfterValidator(_require_distinct)
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Rate = Annotated[float, Field(gt=0)]
Tokens = Annotated[int, Field(gt=0, le=2**31)]


class StudyError(SeqmixError):
    """A study cannot be run, or its comparison would not be fair."""


class StudyFileError(StudyError, DataError):
    """The folder of a study cannot be written."""


class Entry(Config):
    """A model of a study, as changes to the base."""

    extends: str | None = None
    """Preset, or file beside the study, whose model replaces the base's; the vocabulary size stays that of the base."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Changes to the model, merged like those of a configuration file."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Changes to the training; those that affect the batches or the evaluation are not allowed."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes by dotted path, such as model.blocks.ret.mixer.decay."""
    match: Match | None = None
    """Matching of this entry in place of the study's; null for no matching."""

    @field_validator("training", "set")
    @classmethod
    def _changes_are_its_own(cls, changes: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for path in changes if info.field_name == "set" else (f"training.{name}" for name in changes):
            top, _, rest = path.partition(".")
            if top not in ("model", "training") or not rest:
                raise ValueError(
                    f"an entry can only change fields of model and training, got {path}: change it for the whole study"
                )
            if top == "training" and rest in EQUAL_TRAINING_FIELDS:
                raise ValueError(
                    f"{path} affects the batches or the evaluation, which must be the same for all entries: change it "
                    "for the whole study, or vary it"
                )
        return changes

    @property
    def paths(self) -> list[str]:
        """Dotted paths of all fields that the entry changes."""
        return list(leaves({"model": self.model, "training": self.training, **self.set}))


class Tune(Config):
    """Tuning of the learning rate, with the same budget for every entry: each is trained at every rate and seed."""

    learning_rate: Annotated[tuple[Rate, ...], OnceEach]
    """Peak learning rates to try. The one with the lowest final validation loss, averaged over the tuning seeds, is
    used for the study's own seeds."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1), OnceEach] | None = None
    """Seeds of the tuning runs, which must not be in `seeds`; null for one seed, the largest of `seeds` plus 1."""

    @field_validator("learning_rate")
    @classmethod
    def _there_is_a_choice(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if len(rates) < 2:
            raise ValueError(
                f"expected at least two learning rates to choose from, got {list(rates)}: add rates, or set one rate "
                "with training: {learning_rate: 1e-3}"
            )
        return rates


class TrainSpeed(Config):
    """Timing of training steps."""

    lengths: tuple[Tokens, ...] = Field(min_length=1)
    """Sequence lengths in tokens."""
    tokens: int = Field(default=2048, gt=0)
    """Maximum tokens of a step, which has whole sequences, and at least one."""


class DecodeSpeed(Config):
    """Timing of decoding."""

    contexts: tuple[Tokens, ...] = Field(min_length=1)
    """Context lengths in tokens, after which decoding is timed."""
    batch: int = Field(default=1, gt=0)
    """Sequences that are decoded at once."""


class Speed(Config):
    """Timing of all entries after the runs, interleaved; figures are medians."""

    train: TrainSpeed | None = None
    """Timing of training steps; null for none."""
    decode: DecodeSpeed | None = None
    """Timing of decoding; null for none."""
    repeat: int = Field(default=5, ge=5, le=10_000)
    """Number of timing rounds, over which medians are taken."""
    cpu_time: bool = False
    """True to measure CPU time, which other processes on a busy machine disturb least."""


class PaperFigure(Config):
    """A number of a paper to compare with a measurement of the study."""

    label: str = Field(min_length=1)
    """Name of the number, and its place in the paper."""
    entry: str
    """Entry whose measurement is compared with the number."""
    theirs: float
    """Value in the paper."""
    ours: Literal["perplexity", "validation_loss", "accuracy"] = "perplexity"
    """Measurement of the study that is compared; perplexity is exp(validation loss)."""


class Study(Config):
    """Models that are trained under identical conditions: same data order, tokens and schedule."""

    name: Name | None = None
    """Name of the study; by default, that of its file."""
    question: str | None = None
    """Question that the study answers, in one sentence."""
    base: str
    """Preset, or file beside the study: the model, data and training that all entries start from."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Changes to the model of all entries."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Changes to the data of all entries."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Changes to the training of all entries."""
    mixers: tuple[Annotated[str, Field(min_length=1)] | dict[str, Any], ...] = ()
    """Entries that are the base with another mixer in all blocks: a kind, which keeps the base's number of heads, or a
    mapping with a kind and options."""
    entries: dict[Name, Entry] = Field(default_factory=dict)
    """Entries by name, as changes to the base."""
    subject: str | None = None
    """Entry that the question is about, with which the report begins; null for the first entry."""
    margin: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Size up to which a difference of scores does not matter, a share for accuracies and nats per token for losses:
    entries within it are equivalent; null if no equivalence is to be tested."""
    learned: float = Field(default=LEARNED, gt=0, le=1)
    """Accuracy from which a seed has learned a task, for tasks that some seeds learn and others do not."""
    match: Match | None = None
    """Matching of all entries to equal cost; null for none."""
    equal: dict[str, Any] = Field(default_factory=dict)
    """Options of mixers, such as short_conv: 4, that are set in every mixer that has them; the plan and the report name
    the mixers that have no such option or do not allow the value."""
    seeds: Annotated[tuple[Seed, ...], OnceEach] = Field(default=(0,), min_length=1)
    """Random seeds, each a run of every entry; a seed determines the initial parameters and the order of the data."""
    tune: Tune | None = None
    """Tuning of each entry's learning rate before the runs; null to use that of the configuration."""
    vary: dict[str, Annotated[tuple[Any, ...], Field(min_length=1), OnceEach]] = Field(default_factory=dict)
    """Values by dotted path, such as data.sequence_length: [512, 1024] or equal.short_conv: [null, 4]; every
    combination is a variant of the study."""
    threads: int = Field(default=1, gt=0)
    """CPU threads of a run; on a CPU, the last bits of results depend on this number."""
    speed: Speed | None = None
    """Timing of training and decoding after the runs; null for none."""
    paper: tuple[PaperFigure, ...] = ()
    """Numbers of a paper to compare with the study's measurements."""

    @model_validator(mode="before")
    @classmethod
    def _learning_rates_are_tuned(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "learning_rates" not in value or "tune" in value:
            return value
        rest = {name: entry for name, entry in value.items() if name != "learning_rates"}
        rates = value["learning_rates"]
        if isinstance(rates, list | tuple) and len(rates) == 1:
            new = f"training: {{learning_rate: {rates[0]}}}"
            rest["training"] = {**(value.get("training") or {}), "learning_rate": rates[0]}
        else:
            new = f"tune: {{learning_rate: {shown(rates)}}}"
            rest["tune"] = {"learning_rate": rates}
        warnings.warn(deprecation("learning_rates", new), FutureWarning, stacklevel=2)
        return rest

    @field_validator("mixers")
    @classmethod
    def _mixers_have_kinds(cls, mixers: tuple[Any, ...]) -> tuple[Any, ...]:
        kinds = [mixer if isinstance(mixer, str) else mixer.get("kind") for mixer in mixers]
        for mixer, kind in zip(mixers, kinds, strict=True):
            if not isinstance(kind, str):
                raise ValueError(f"expected a mixer's kind or a mapping with the key kind, got {mixer}")
            if kinds.count(kind) > 1:
                raise ValueError(f"{kind} is listed twice: give each a name under entries")
        return mixers

    @field_validator("vary")
    @classmethod
    def _variants_are_of_all(cls, vary: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for path in vary:
            keys = {"seed": "seeds", "training.learning_rate": "tune"}
            if path in keys:
                raise ValueError(f"vary cannot change {path}: use {keys[path]}")
            if path.partition(".")[0] not in ("model", "data", "training", "equal") or path.count(".") < 1:
                raise ValueError(f"vary expects fields of model, data, training or equal, got {path}")
        return vary

    @model_validator(mode="after")
    def _entries_are_told_apart(self) -> Self:
        if not (names := self.names):
            raise ValueError("a study needs entries to compare: give mixers, entries, or both")
        if duplicate := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{duplicate} is in both mixers and entries: rename the entry")
        named = [("subject", self.subject), *(("paper", figure.entry) for figure in self.paper)]
        for field, name in named:
            if name is not None and name not in names:
                raise ValueError(f"{field} names an unknown entry {name!r}{choices_hint(name, names, 'entries')}")
        return self

    @model_validator(mode="after")
    def _tuning_has_its_own_seeds(self) -> Self:
        if shared := sorted(set(self.tuning_seeds) & set(self.seeds)):
            raise ValueError(
                f"tune.seeds and seeds must differ, got {shared[0]} in both: a rate looks better than it is on "
                "the seeds that it was chosen by, so results need other seeds; choose other tune.seeds"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_changed_twice(self) -> Self:
        entry_paths = {f"entries.{name}": entry.paths for name, entry in self.entries.items()}
        matches = (self.match, *(entry.match for entry in self.entries.values()))
        if self.tune is not None:
            for place, paths in {"training": list(leaves({"training": self.training})), **entry_paths}.items():
                if "training.learning_rate" in paths:
                    raise ValueError(
                        f"{place} has a learning rate, but tune chooses that of every entry: remove one of them"
                    )
        for varied in self.vary:
            for place, path in ((place, path) for place, paths in entry_paths.items() for path in paths):
                if f"{path}.".startswith(f"{varied}.") or f"{varied}.".startswith(f"{path}."):
                    raise ValueError(
                        f"vary changes {varied} in all entries, but {place} changes {path} too: remove one of them"
                    )
            for match in matches:
                if match is not None and fnmatchcase(varied, f"model.{match.knob}"):
                    raise ValueError(
                        f"vary changes {varied}, but so does the knob {match.knob} of match: remove one of them"
                    )
        for option in self.equal_options:
            for place, changed in self.mixer_options():
                if changed == option:
                    raise ValueError(f"equal sets {option} in all mixers, but {place} sets it too: remove one of them")
            if option in self.equal and f"equal.{option}" in self.vary:
                raise ValueError(f"vary changes equal.{option}, but equal sets {option} too: remove one of them")
        return self

    def mixer_options(self) -> Iterator[tuple[str, str]]:
        """Yield the options of mixers that entries set: the place of each in the study, and its name."""
        for mixer in self.mixers:
            if not isinstance(mixer, str):
                yield from ((f"mixers: {kind_of(mixer)}", option) for option in mixer)
        for name, entry in self.entries.items():
            for path in entry.paths:
                *parents, option = path.split(".")
                if parents[:2] == ["model", "blocks"] and "mixer" in parents[3:]:
                    yield f"entries.{name}", option
        for path in self.vary:
            *parents, option = path.split(".")
            if parents[:2] == ["model", "blocks"] and "mixer" in parents[3:]:
                yield "vary", option

    @property
    def equal_options(self) -> list[str]:
        """Names of the options that are equal in all mixers."""
        return [*self.equal, *(path.removeprefix("equal.") for path in self.vary if path.startswith("equal."))]

    def options(self, variant: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that are equal in all mixers of a variant, with their values."""
        varied = {path.removeprefix("equal."): value for path, value in variant.items() if path.startswith("equal.")}
        return self.equal | varied

    @property
    def tuning_seeds(self) -> tuple[int, ...]:
        """Seeds of the tuning runs; none without `tune`."""
        if self.tune is None:
            return ()
        return (max(self.seeds) + 1,) if self.tune.seeds is None else self.tune.seeds

    @property
    def names(self) -> list[str]:
        """Names of all entries."""
        return [*(kind_of(mixer).rpartition(":")[2] for mixer in self.mixers), *self.entries]

    @property
    def size(self) -> int:
        """Number of runs."""
        tuning = len(self.tuning_seeds) * len(self.tune.learning_rate if self.tune is not None else ())
        return math.prod(map(len, (*self.vary.values(), self.names))) * (tuning + len(self.seeds))


def kind_of(mixer: str | Mapping[str, Any]) -> str:
    """Return the kind of an item of a study's `mixers`."""
    return mixer if isinstance(mixer, str) else str(mixer["kind"])


def find_study(source: str) -> Path:
    """Return the file of a study, given as a YAML file or as the name of a study of the package.

    Raises:
        StudyError: there is no such file or study.
    """
    file = Path(source)
    if file.is_file():
        return file
    if file.suffix in (".yaml", ".yml"):
        siblings = [other.name for other in file.parent.glob(f"*{file.suffix}")]
        hint = nearest_hint(file.name, siblings) or "."
        raise StudyError(f"the study {file} does not exist{hint} `seqmix compare --list` names those of the package")
    names = shipped()
    if source not in names:
        raise StudyError(
            f"no study {source!r}: give a YAML file or one of {', '.join(names)}{nearest_hint(source, names)}"
        )
    return STUDIES / f"{source}.yaml"


def shipped() -> list[str]:
    """Return the names of the studies that come with the package."""
    return sorted(file.stem for file in STUDIES.glob("*.yaml"))


def load_study(file: Path) -> Study:
    """Read a study from a file; without a name of its own, it gets that of the file.

    Raises:
        ConfigError: the file is invalid; the message has the place, the problem and the allowed values.
    """
    study = load(Study, file, presets=STUDIES)
    # bytes of a file name that are not valid text appear as surrogates, which results.json cannot hold
    stem = file.stem.encode(errors="surrogateescape").decode(errors="replace")
    return study if study.name is not None else study.model_copy(update={"name": stem})
