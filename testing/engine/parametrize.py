"""Checks as pytest cases."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hypothesis import core, settings

from ...registry import SeqmixError, nearest
from .outcome import Outcomes, Status, chosen_names, known_names

COMMAND_LINE: dict[str, Any] = {}
"""Options given to pytest itself (pytest_plugin.py), which hold whatever tests say."""


@dataclass(frozen=True)
class BoundCheck:
    """A check with its mixer or kernel, as pytest passes it to a test."""

    name: str
    run: Callable[..., Outcomes]
    options: Mapping[str, Any]

    def __call__(self, **options: Any) -> None:
        """Run it, with these options beside those given before; hypothesis' profile and seed hold here too."""
        import pytest

        if fixed := sorted({"checks", "expected_failures"} & options.keys()):
            raise SeqmixError(f"{fixed[0]} is given where tests are made of checks, not where one is run")
        given = {"seed": _seed(), "examples": settings().max_examples, **self.options, **options, **COMMAND_LINE}
        try:
            report = self.run(**given)
        except SeqmixError as error:  # nothing that a traceback of the kit would explain
            pytest.fail(str(error), pytrace=False)
        if not report.outcomes:
            pytest.fail("ran no check", pytrace=False)
        ends = {Status.SKIPPED: pytest.skip, Status.EXPECTED_FAILURE: pytest.xfail}
        ends[Status.FAILED] = partial(pytest.fail, pytrace=False)
        for outcome in report.outcomes:
            if outcome.status in ends:
                ends[outcome.status](outcome.reason)


def parametrized(
    tested: Sequence[tuple[str, str, Callable[..., Outcomes]]],
    known: Collection[str],
    *,
    what: str,
    checks: Iterable[str] | None,
    expected_failures: Mapping[str, Mapping[str, str]] | None,
    options: Mapping[str, Any],
) -> Any:
    """pytest's decorator with a case for every check of those known and everything tested: its label, the name (of a
    "kind" or "kernel") that `expected_failures` has for it, and what runs checks on it."""
    import pytest

    chosen, expected = chosen_names(checks, known), expected_failures or {}
    names = dict.fromkeys(name for _, name, _ in tested)
    for name, failures in expected.items():
        if name not in names:
            raise SeqmixError(
                f"expected_failures names the {what} {name!r}, which is not tested here; tested: "
                f"{', '.join(names)}{nearest(name, names)}"
            )
        known_names(failures, known)
    cases = []
    for label, name, run in tested:
        for check in chosen:
            reasons = {other: why for other, why in expected.get(name, {}).items() if other == check}
            bound = BoundCheck(check, partial(run, checks=[check], expected_failures=reasons), options)
            cases.append(pytest.param(bound, id=f"{label}-{check}"))
    return pytest.mark.parametrize("check", cases)


def _seed() -> int | None:
    """The same in every run, so that a suite that passes goes on passing; None, which leaves it to hypothesis, under
    `--hypothesis-seed` and under a profile of the project's own, such as one that looks for more every night."""
    # where its pytest plugin puts the option, and the name for which older versions have no function
    forced, profile = getattr(core, "global_force_seed", None), getattr(settings, "_current_profile", "default")
    return 0 if forced is None and profile in ("default", "ci") else None
