"""How checks end, and which are selected, for mixers and for kernels."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ...registry import SeqmixError, require_name
from .check import Check


class Status(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    EXPECTED_FAILURE = "expected failure"


@dataclass(frozen=True)
class CheckOutcome:
    """One check on one mixer or kernel."""

    check: Check
    status: Status
    reason: str = ""
    """Why it was skipped or expected to fail; of a failure, the whole report, or where its cause is reported."""
    examples: int = 0
    """Cases run, until one failed."""
    seconds: float = 0.0
    case: Any = None
    """Of a failure, the case: the smallest found, where cases are reduced."""
    script: tuple[str, ...] = ()
    """Of a failure on a case, the lines that reproduce it."""
    same_as: str = ""
    """Of a failure whose cause an earlier check has reported, that check's name."""
    notes: tuple[str, ...] = ()
    """Warnings: what is no failure, and worth knowing."""


@dataclass
class Outcomes:
    """All checks on one mixer or kernel."""

    outcomes: list[CheckOutcome] = field(default_factory=list, kw_only=True)

    @property
    def passed(self) -> bool:
        """True if nothing failed."""
        return not self.failures

    @property
    def failures(self) -> list[CheckOutcome]:
        """The checks that failed."""
        return [outcome for outcome in self.outcomes if outcome.status is Status.FAILED]


def known_names(names: Iterable[str], checks: Collection[str]) -> list[str]:
    """Names of checks, in the order in which the checks run; one that there is not is a SeqmixError."""
    names = list(names)
    for name in names:
        require_name("check", name, checks)
    return [name for name in checks if name in names]


def chosen_names(names: Iterable[str] | None, checks: Mapping[str, Check], *, stress: bool = False) -> list[str]:
    """Names of the checks to run; None chooses the default ones, and with `stress` all.

    Raises:
        SeqmixError: a name that is no check's, or an empty selection.
    """
    if names is None:
        return [name for name, check in checks.items() if stress or not check.stress]
    if isinstance(names, str):
        raise SeqmixError(f"checks needs a list of names, and was given {names!r}: write [{names!r}]")
    if not (chosen := known_names(names, checks)):
        raise SeqmixError("checks names none, so nothing would be checked: leave it out for all of them")
    return chosen
