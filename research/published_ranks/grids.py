"""Published comparisons of mixers as data: grids/NAME.yaml, with the entries that stand for their models.

A grid holds numbers that were read in a publication, for models that were trained under the same conditions. Each model
is represented by an entry of the suite (suite/leaderboard.yaml): a mixer of the library with options.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ...lab.suite.leaderboard import LEADERBOARD, Arxiv, LeaderboardEntry, load_entries
from ...registry import Config, SeqmixError, choices_hint, load

FOLDER = Path(__file__).parent
GRIDS = "grids"
Subject = Literal["language", "recall", "tracking", "synthetic"]


class Measure(Config):
    """Column of a published table."""

    asks: Subject
    """Ability that the column measures: language (perplexity), recall (facts of a given text), tracking (state
    tracking), or synthetic (tasks of MAD)."""
    what: str
    """The number in words, as "WikiText perplexity"."""
    better: Literal["lower", "higher"]
    task: str | None = None
    """Task of the suite that asks the same in a smaller setting; null for none."""


class Model(Config):
    """Model of a paper."""

    entry: str
    """Name of the entry that stands for it."""
    values: dict[str, float | Annotated[tuple[float, ...], Field(min_length=1)]]
    """Values by measure; of a list, the mean counts."""
    own: bool = False
    """True if the paper proposes this model."""
    remark: str = ""
    """Known differences between the paper's model and the entry."""


class Grid(Config):
    """Published comparison of models that were trained under the same conditions."""

    title: str
    """Short name for tables."""
    paper: str
    """Title of the publication."""
    arxiv: Arxiv | None
    """arXiv number; null for results outside of a paper."""
    address: str = Field(pattern=r"^https?://")
    """Address of the publication."""
    published: str = Field(pattern=r"^\d{4}-\d{2}$")
    """Year and month of the numbers."""
    tables: str
    """Tables with the numbers."""
    read: bool
    """True if the numbers were read as printed; only such grids are used."""
    how_read: str
    """Kind of copy in which the numbers were read, and how they were checked."""
    excluded: str | None = None
    """Reason why a grid is not used although it was read; null if it is used."""
    size: str
    """Size of the models."""
    data: str
    """Training tokens or steps, and their source."""
    equal: str
    """Conditions that were equal for all models."""
    measures: dict[str, Measure] = Field(min_length=1)
    models: dict[str, Model] = Field(min_length=2)
    unmapped: tuple[str, ...] = ()
    """Models of the table without a counterpart here."""
    remark: str = ""

    @model_validator(mode="after")
    def _check_values(self) -> "Grid":
        for name, model in self.models.items():
            for measure in model.values:
                if measure not in self.measures:
                    raise ValueError(
                        f"models.{name}.values: expected one of the measures {', '.join(self.measures)}, got "
                        f"{measure!r}"
                    )
            if not model.values:
                raise ValueError(f"models.{name}.values: expected a value of at least one measure, got none")
        used = [model.entry for model in self.models.values()]
        for entry in used:
            if used.count(entry) > 1:
                raise ValueError(f"models: expected each entry once, got {entry!r} for {used.count(entry)} models")
        return self

    @property
    def used(self) -> bool:
        """True if the grid takes part in comparisons."""
        return self.read and self.excluded is None

    def column(self, measure: str) -> dict[str, float]:
        """Return a measure's values by entry, with the sign for which more is better."""
        sign = 1 if self.measures[measure].better == "higher" else -1
        values = {model.entry: model.values[measure] for model in self.models.values() if measure in model.values}
        return {
            entry: sign * (sum(value) / len(value) if isinstance(value, Sequence) else value)
            for entry, value in values.items()
        }

    def own_entries(self) -> set[str]:
        """Return the entries of models that the paper proposes."""
        return {model.entry for model in self.models.values() if model.own}


def load_grid(file: Path, entries: Mapping[str, LeaderboardEntry]) -> Grid:
    """Load one grid.

    Raises:
        SeqmixError: the file is wrong, or names an entry that does not exist.
    """
    grid = load(Grid, file, presets=file.parent)
    for name, model in grid.models.items():
        if model.entry not in entries:
            hint = choices_hint(model.entry, entries, "entries")
            raise SeqmixError(f"{file}: models.{name}.entry: {LEADERBOARD} has no {model.entry!r}{hint}")
    return grid


@cache
def load_grids() -> Mapping[str, Grid]:
    """Load all grids by name, oldest first."""
    files = sorted((FOLDER / GRIDS).glob("*.yaml"))
    grids = {file.stem: load_grid(file, load_entries()) for file in files}
    return dict(sorted(grids.items(), key=lambda item: (item[1].published, item[0])))


def entries_of(grids: Mapping[str, Grid]) -> dict[str, LeaderboardEntry]:
    """Return the entries that stand for models of the grids."""
    named = {model.entry for grid in grids.values() for model in grid.models.values()}
    return {name: entry for name, entry in load_entries().items() if name in named}
