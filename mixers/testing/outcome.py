"""How checks end, of mixers and of kernels alike."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, Protocol, TypeVar

from hypothesis import settings
from hypothesis.strategies import SearchStrategy

from ...registry import SeqmixError, nearest
from .compare import CheckFailure
from .search import search, where_raised


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
    """Cases run."""
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


def conclude(
    check: K,
    attempt: Callable[[C], None],
    cases: SearchStrategy[C],
    explain: Callable[[C], Iterable[str]],
    *,
    subject: str,
    examples: int,
    seed: int | None,
    shrink: bool,
    expected: str | None,
) -> Outcome[K, C]:
    """Run a check.

    Args:
        check: what is promised.
        attempt: raises where a case breaks the promise.
        cases: what is drawn from.
        explain: lines of a report about the smallest case.
        subject: what is checked, as a report names it.
        examples: cases at most.
        seed: of the cases; None lets hypothesis draw anew (or use its own seed).
        shrink: whether the smallest counterexample is searched for.
        expected: the reason why the check is known to fail.
    """
    started = time.perf_counter()
    error, case, count = search(attempt, cases, examples=examples, seed=seed, shrink=shrink)
    seconds = time.perf_counter() - started
    if error is None:
        if expected is not None:
            text = f"{check.name} passed, and was expected to fail: {expected}"
            return Outcome(check, Status.FAILED, text, count, seconds)
        return Outcome(check, Status.PASSED, "", count, seconds)
    if expected is not None:
        return Outcome(check, Status.EXPECTED_FAILURE, expected, count, seconds, case)
    what = str(error) if isinstance(error, CheckFailure) else where_raised(error)
    lines = [f"{subject} fails {check.name}: {check.promise}", *what.splitlines()]
    if case is not None:
        lines += explain(case)
    return Outcome(check, Status.FAILED, "\n".join(lines), count, seconds, case)


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


@dataclass(frozen=True)
class Bound:
    """A check with its subject, as pytest passes it to a test."""

    run: Callable[..., Outcomes[Any, Any]]
    options: Mapping[str, Any]

    def __call__(self, **options: Any) -> None:
        """Run it, with these options beside those given before; hypothesis' profile and seed hold here too."""
        import pytest

        report = self.run(**{"seed": None, "examples": settings().max_examples, **self.options, **options})
        for outcome in report.outcomes:
            if outcome.status is Status.FAILED:
                pytest.fail(outcome.reason, pytrace=False)
            if outcome.status is Status.SKIPPED:
                pytest.skip(outcome.reason)
            if outcome.status is Status.EXPECTED_FAILURE:
                pytest.xfail(outcome.reason)
