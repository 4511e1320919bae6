"""How checks end, of mixers and of kernels alike, and how pytest is told."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

from hypothesis import core, settings

from ..registry import SeqmixError, nearest


class Promise(Protocol):
    """What a check of a mixer and one of a kernel have in common."""

    @property
    def name(self) -> str:
        """As in reports."""
        ...

    @property
    def promise(self) -> str:
        """One sentence."""
        ...


K = TypeVar("K", bound=Promise)
C = TypeVar("C")


class Status(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    EXPECTED_FAILURE = "expected failure"


@dataclass(frozen=True)
class Outcome(Generic[K, C]):
    """One check on one subject."""

    check: K
    status: Status
    reason: str = ""
    """Why it was skipped or expected to fail; of a failure, the whole report."""
    examples: int = 0
    """Cases run, until one failed."""
    seconds: float = 0.0
    case: C | None = None
    """Of a failure, the smallest case found."""


@dataclass
class Outcomes(Generic[K, C]):
    """All checks on one subject."""

    outcomes: list[Outcome[K, C]] = field(default_factory=list, kw_only=True)

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def failures(self) -> list[Outcome[K, C]]:
        """The checks that failed."""
        return [outcome for outcome in self.outcomes if outcome.status is Status.FAILED]


# ---- what is asked for


def known_names(names: Iterable[str], checks: Collection[str]) -> list[str]:
    """Names of checks, in the order in which the checks run.

    Raises:
        SeqmixError: there is no such check; the nearest match is named.
    """
    names = list(names)
    for name in names:
        if name not in checks:
            raise SeqmixError(f"there is no check {name!r}; checks: {', '.join(checks)}{nearest(name, checks)}")
    return [name for name in checks if name in names]


def chosen_names(names: Iterable[str] | None, checks: Collection[str]) -> list[str]:
    """Names of the checks to run: all where none are named.

    Raises:
        SeqmixError: there is no such check, or the selection is empty.
    """
    if names is None:
        return list(checks)
    if isinstance(names, str):
        raise SeqmixError(f"checks needs a list of names, and was given {names!r}: write [{names!r}]")
    if not (found := known_names(names, checks)):
        raise SeqmixError("checks names none, so nothing would be checked: leave it out for all of them")
    return found


def require_examples_asked(examples: int) -> None:
    """Refuse to run no case at all.

    Raises:
        SeqmixError: it is no number of cases.
    """
    if not isinstance(examples, int) or isinstance(examples, bool) or examples < 1:
        raise SeqmixError(f"examples needs an integer >= 1, and was given {examples!r}")


def known_failures(
    expected: Mapping[str, Mapping[str, str]] | None, subjects: Collection[str], checks: Collection[str], what: str
) -> dict[str, dict[str, str]]:
    """Checks that are known to fail, by what is tested.

    Raises:
        SeqmixError: there is no such subject or check; the nearest match is named.
    """
    for name, failures in (expected or {}).items():
        if name not in subjects:
            raise SeqmixError(
                f"expected_failures names the {what} {name!r}, which is not tested here; tested: "
                f"{', '.join(subjects)}{nearest(name, subjects)}"
            )
        known_names(failures, checks)
    return {name: dict(failures) for name, failures in (expected or {}).items()}


# ---- pytest


@dataclass(frozen=True)
class Bound:
    """A check with its subject, as pytest passes it to a test."""

    run: Callable[..., Outcomes[Any, Any]]
    options: Mapping[str, Any]

    def __call__(self, **options: Any) -> None:
        """Run it, with these options beside those given before; hypothesis' profile and seed hold here too."""
        import pytest

        if fixed := sorted({"checks", "expected_failures"} & options.keys()):
            raise SeqmixError(f"{fixed[0]} is given where tests are made of checks, not where one is run")
        given = {"seed": _seed(), "examples": settings().max_examples, **self.options, **options}
        try:
            report = self.run(**given)
        except SeqmixError as error:  # nothing that a traceback of the kit would explain
            pytest.fail(str(error), pytrace=False)
        if not report.outcomes:
            pytest.fail("ran no check", pytrace=False)
        for outcome in report.outcomes:
            if outcome.status is Status.FAILED:
                pytest.fail(outcome.reason, pytrace=False)
            if outcome.status is Status.SKIPPED:
                pytest.skip(outcome.reason)
            if outcome.status is Status.EXPECTED_FAILURE:
                pytest.xfail(outcome.reason)


def _seed() -> int | None:
    """Of the cases that a test draws: always the same, so that a suite that passes goes on passing.

    None, which leaves it to hypothesis, under `--hypothesis-seed` and under a profile of the project's own, such as one
    that looks for more every night.
    """
    # where its pytest plugin puts the option, and the name for which older versions have no function
    forced, profile = getattr(core, "global_force_seed", None), getattr(settings, "_current_profile", "default")
    return 0 if forced is None and profile in ("default", "ci") else None
