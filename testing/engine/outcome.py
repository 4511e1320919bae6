"""Outcomes of checks, and the selection of checks by name, for mixers and for kernels."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ...registry import SeqmixError, require_name
from .check import Check


class Status(StrEnum):
    """Result of a check."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    EXPECTED_FAILURE = "expected failure"


@dataclass(frozen=True)
class CheckOutcome:
    """Outcome of one check on one mixer or kernel."""

    check: Check
    status: Status
    reason: str = ""
    """Why the check was skipped or expected to fail; for a failure, its report (one line if `same_as` is set)."""
    examples: int = 0
    """Number of cases run, up to and including the first that failed."""
    seconds: float = 0.0
    """Time that the check took, in seconds."""
    case: Any = None
    """The case that failed, reduced to a small one unless reduction is off; None if no case failed."""
    script: tuple[str, ...] = ()
    """Lines of Python that reproduce the failure; empty if no case failed."""
    same_as: str = ""
    """Name of an earlier check that failed for the same cause and reports it; empty otherwise."""
    notes: tuple[str, ...] = ()
    """Warnings that do not fail the check."""


@dataclass
class Outcomes:
    """Outcomes of all checks on one mixer or kernel."""

    outcomes: list[CheckOutcome] = field(default_factory=list, kw_only=True)

    @property
    def passed(self) -> bool:
        """True if no check failed."""
        return not self.failures

    @property
    def failures(self) -> list[CheckOutcome]:
        """Outcomes of the checks that failed."""
        return [outcome for outcome in self.outcomes if outcome.status is Status.FAILED]


def known_names(names: Iterable[str], checks: Collection[str]) -> list[str]:
    """Return names of checks, sorted by the order in which the checks run.

    Raises:
        SeqmixError: no check has one of the names.
    """
    names = list(names)
    for name in names:
        require_name("check", name, checks)
    return [name for name in checks if name in names]


def chosen_names(names: Iterable[str] | None, checks: Mapping[str, Check], *, stress: bool = False) -> list[str]:
    """Return the names of the checks to run; None selects the default checks, or all of them with `stress`.

    Raises:
        SeqmixError: no check has one of the names, or the selection is empty.
    """
    if names is None:
        return [name for name, check in checks.items() if stress or not check.stress]
    if isinstance(names, str):
        raise SeqmixError(f"checks must be a list of names, got {names!r}: write [{names!r}]")
    if not (chosen := known_names(names, checks)):
        raise SeqmixError("checks must name at least one check, got an empty list: omit it to run the default checks")
    return chosen
