"""What a study is: models that are trained under identical conditions, and what is asked of them; one YAML file.

question: Which mixers recall?
base: retnet-tiny                       # a preset or a file: the model, the text and the training of all
mixers: [retention, attention]          # entries by their mixers alone
entries:                                # or by any difference of their models
  hybrid: {extends: hybrid-tiny}
match: {parameters: retention, knob: blocks.*.ffn.expansion}
seeds: [0, 1, 2]
learning_rates: [1.0e-3, 3.0e-3]
"""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from ..registry import Config, SeqmixError, load, nearest
from .differences import leaves
from .match import Match

STUDIES = Path(__file__).with_name("studies")
"""The folder of the studies that come with the package."""
SAME = (
    "steps",
    "batch_size",
    "evaluate_every",
    "evaluation_batches",
    "final_evaluation_batches",
    "evaluation_lengths",
    "patience",
    "carry_state",
)
"""Fields of `training` that decide what is read and how it is judged: they are the same for all entries."""


def _once_each(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(map(repr, values))) < len(values):
        raise ValueError(f"each value once, and there are {list(values)}")
    return values


OnceEach = AfterValidator(_once_each)
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Rate = Annotated[float, Field(gt=0)]
Tokens = Annotated[int, Field(gt=0, le=2**31)]


class StudyError(SeqmixError):
    """A study cannot be made, or would compare what cannot be compared."""


class Entry(Config):
    """One model of a study, as a difference of the base's."""

    extends: str | None = None
    """A preset, or a file beside the study, whose model takes the place of the base's; its vocabulary stays."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Changes of the model, merged as a file's."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Changes of the training that leave alone what is read and how it is judged."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes by dotted path, such as model.blocks.ret.mixer.decay."""
    match: Match | None = None
    """The entry's own, in place of the study's; null for none."""

    @field_validator("training", "set")
    @classmethod
    def _changes_are_its_own(cls, changes: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        for path in changes if info.field_name == "set" else (f"training.{name}" for name in changes):
            top, _, rest = path.partition(".")
            if top not in ("model", "training") or not rest:
                raise ValueError(
                    f"an entry changes model and training, and {path} is neither: change it for the whole study"
                )
            if top == "training" and rest in SAME:
                raise ValueError(
                    f"{path} decides what is read or how it is judged, which is the same for all entries: change it "
                    "for the whole study, or vary it"
                )
        return changes

    @property
    def paths(self) -> list[str]:
        """Of all fields that it changes, dotted."""
        return list(leaves({"model": self.model, "training": self.training, **self.set}))


class TrainSpeed(Config):
    """Training steps that are timed."""

    lengths: tuple[Tokens, ...] = Field(min_length=1)
    """Tokens of a sequence."""
    tokens: int = Field(default=2048, gt=0)
    """Tokens of a step, in whole sequences; one sequence at least."""


class DecodeSpeed(Config):
    """Decoded tokens that are timed."""

    contexts: tuple[Tokens, ...] = Field(min_length=1)
    """Tokens that were read before."""
    batch: int = Field(default=1, gt=0)
    """Sequences at once."""


class Speed(Config):
    """What is timed once the runs are made: all entries interleaved, medians."""

    train: TrainSpeed | None = None
    """Steps of training."""
    decode: DecodeSpeed | None = None
    """Tokens of decoding."""
    repeat: int = Field(default=5, ge=5, le=10_000)
    """Rounds."""


class PaperFigure(Config):
    """A figure of a paper, to stand beside ours."""

    label: str = Field(min_length=1)
    """What is measured, and where the paper has it."""
    entry: str
    """The entry that it is compared with."""
    theirs: float
    """The paper's."""
    ours: Literal["perplexity", "validation_loss", "accuracy"] = "perplexity"
    """Which of our measurements it is compared with; perplexity is e to the validation loss."""


class Study(Config):
    """Models that are trained under identical conditions: same data order, tokens and schedule."""

    name: Name | None = None
    """What it is called; that of its file by default."""
    question: str | None = None
    """What it asks, in one sentence."""
    base: str
    """A preset, or a file beside the study: the model, the data and the training that all start from."""
    model: dict[str, Any] = Field(default_factory=dict)
    """Changes of all models."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Changes of the data."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Changes of the training."""
    mixers: tuple[Annotated[str, Field(min_length=1)] | dict[str, Any], ...] = ()
    """Entries that are the base with another mixer in all its blocks: kinds (with as many heads as the base, where both
    have heads), or mappings with a kind."""
    entries: dict[Name, Entry] = Field(default_factory=dict)
    """Entries by name."""
    match: Match | None = None
    """What is made equal of all entries."""
    seeds: Annotated[tuple[Seed, ...], OnceEach] = Field(default=(0,), min_length=1)
    """Each is a run of every entry: parameters and the order of the data are a function of it."""
    learning_rates: Annotated[tuple[Rate, ...], OnceEach] = ()
    """Peak learning rates that every entry is tried with: its best, by the mean over seeds of the final validation
    loss, is reported. The configuration's own where there are none."""
    vary: dict[str, Annotated[tuple[Any, ...], Field(min_length=1), OnceEach]] = Field(default_factory=dict)
    """Values by dotted path, such as data.sequence_length: [512, 1024]; every combination is a variant of the study."""
    threads: int = Field(default=1, gt=0)
    """Threads of a run on a CPU, where the last bits of numbers depend on it."""
    speed: Speed | None = None
    """What is timed."""
    paper: tuple[PaperFigure, ...] = ()
    """Figures that ours are set beside."""

    @field_validator("mixers")
    @classmethod
    def _mixers_have_kinds(cls, mixers: tuple[Any, ...]) -> tuple[Any, ...]:
        kinds = [mixer if isinstance(mixer, str) else mixer.get("kind") for mixer in mixers]
        for mixer, kind in zip(mixers, kinds, strict=True):
            if not isinstance(kind, str):
                raise ValueError(f"a mixer is a kind or a mapping with one, and {mixer} has none")
            if kinds.count(kind) > 1:
                raise ValueError(f"{kind} is there twice: name them under entries")
        return mixers

    @field_validator("vary")
    @classmethod
    def _variants_are_of_all(cls, vary: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for path in vary:
            own = {"seed": "seeds", "training.learning_rate": "learning_rates"}
            if path in own:
                raise ValueError(f"{path} has its own key in a study: {own[path]}")
            if path.partition(".")[0] not in ("model", "data", "training") or path.count(".") < 1:
                raise ValueError(f"what varies is a field of model, data or training, and {path} is none")
        return vary

    @model_validator(mode="after")
    def _entries_are_told_apart(self) -> Self:
        if not (names := self.names):
            raise ValueError("nothing is compared: give mixers, entries, or both")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} is among mixers and entries: call one of them otherwise")
        for figure in self.paper:
            if figure.entry not in names:
                raise ValueError(
                    f"paper has a figure of {figure.entry!r}; entries: {', '.join(names)}{nearest(figure.entry, names)}"
                )
        return self

    @model_validator(mode="after")
    def _nothing_is_changed_twice(self) -> Self:
        own = {f"entries.{name}": entry.paths for name, entry in self.entries.items()}
        for place, paths in {"training": list(leaves({"training": self.training})), **own}.items():
            if self.learning_rates and "training.learning_rate" in paths:
                raise ValueError(
                    f"{place} has a learning rate, and all entries are tried with learning_rates: leave one of them out"
                )
        for varied in self.vary:
            for place, path in ((place, path) for place, paths in own.items() for path in paths):
                if f"{path}.".startswith(f"{varied}.") or f"{varied}.".startswith(f"{path}."):
                    raise ValueError(f"vary changes {varied} of all entries, and {place} {path} of its own")
            for match in (self.match, *(entry.match for entry in self.entries.values())):
                if match is not None and fnmatchcase(varied, f"model.{match.knob}"):
                    raise ValueError(f"vary changes {varied}, and so does the knob {match.knob} of a match")
        return self

    @property
    def names(self) -> list[str]:
        """Of all entries."""
        return [*(kind_of(mixer).rpartition(":")[2] for mixer in self.mixers), *self.entries]

    @property
    def size(self) -> int:
        """Number of runs."""
        return math.prod(map(len, (*self.vary.values(), self.names, self.seeds, self.learning_rates or (None,))))


def kind_of(mixer: str | Mapping[str, Any]) -> str:
    """The kind of one of a study's mixers."""
    return mixer if isinstance(mixer, str) else str(mixer["kind"])


def find_study(source: str) -> Path:
    """The file of a study: one that comes with the package, by name, or a YAML file.

    Raises:
        StudyError: there is none.
    """
    file = Path(source)
    if file.is_file():
        return file
    if file.suffix in (".yaml", ".yml"):
        siblings = [other.name for other in file.parent.glob(f"*{file.suffix}")]
        raise StudyError(f"no file {file}{nearest(file.name, siblings)}")
    names = shipped()
    if source not in names:
        known = f"studies: {', '.join(names)}{nearest(source, names)}"
        raise StudyError(f"there is no study {source!r}; {known}; or give a YAML file")
    return STUDIES / f"{source}.yaml"


def shipped() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(file.stem for file in STUDIES.glob("*.yaml"))


def load_study(file: Path) -> Study:
    """Read a study; it has the name of its file if it gives itself none.

    Raises:
        ConfigError: what is wrong, where, and what is allowed.
    """
    study = load(Study, file, presets=STUDIES)
    # bytes of a name that are no text come as surrogates, which no results can hold
    stem = file.stem.encode(errors="surrogateescape").decode(errors="replace")
    return study if study.name is not None else study.model_copy(update={"name": stem})
