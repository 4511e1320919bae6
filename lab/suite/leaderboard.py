"""Entries of the leaderboard and of rank transfer: mixers of the library with options, from leaderboard.yaml."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ...registry import Config, load
from ...registry.yaml import write as to_yaml

FOLDER = Path(__file__).parent
LEADERBOARD = "leaderboard.yaml"
Arxiv = Annotated[str, Field(pattern=r"^\d{4}\.\d{5}$")]
"""arXiv number."""
Family = Literal[
    "sparse attention",
    "softmax attention",
    "linear attention and decays",
    "test-time training",
    "delta rule",
    "sequential cells",
    "recurrences by channel",
    "long convolution",
]


class LeaderboardEntry(Config):
    """Mixer of the library with options; it also stands for models of papers."""

    mixer: dict[str, Any]
    """Kind and options; `seqmix suite` adds the heads."""
    family: Family
    """Op family of the mixer, as in the reference of mixers; rank transfer leaves out one at a time."""
    arxiv: Arxiv
    """Paper of the mixer or option; its month is the date of the entry."""

    @property
    def kind(self) -> str:
        """Kind of the mixer."""
        return self.mixer["kind"]

    @property
    def date(self) -> float:
        """Month of the paper as a number that grows: 2312.04927 is 2312."""
        return float(self.arxiv.partition(".")[0])


class Leaderboard(Config):
    """Entries by the names that the suite's tables have for them."""

    entries: dict[str, LeaderboardEntry] = Field(min_length=1)


@cache
def load_entries() -> Mapping[str, LeaderboardEntry]:
    """Load the entries by name."""
    return load(Leaderboard, FOLDER / LEADERBOARD, presets=FOLDER).entries


def arguments(entries: Mapping[str, LeaderboardEntry]) -> list[str]:
    """Return the entries as arguments of `seqmix suite`: the kind, or NAME={kind: MIXER, ...}."""
    return [
        name if entry.mixer == {"kind": name} else f"{name}={to_yaml(entry.mixer, in_one_line=True).strip()}"
        for name, entry in entries.items()
    ]
