"""Checks as pytest cases."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hypothesis import core, settings

from ...registry import SeqmixError, nearest
from .check import Check
from .outcome import Outcomes, Status, chosen_names, known_names


@dataclass
class CommandLine:
    """Options given to pytest itself (pytest_plugin.py), which hold whatever tests say."""

    examples: int | None = None
    stress: bool = False


COMMAND_LINE = CommandLine()


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
        given = {"seed": _seed(), "examples": settings().max_examples, **self.options, **options}
        if COMMAND_LINE.examples is not None:
            given["examples"] = COMMAND_LINE.examples
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
    known: Mapping[str, Check],
    *,
    what: str,
    checks: Iterable[str] | None,
    stress: bool = False,
    expected_failures: Mapping[str, Mapping[str, str]] | None,
    options: Mapping[str, Any],
) -> Any:
    """pytest's decorator with a case for every check of those known and everything tested: its label, the name (of a
    "kind" or "kernel") that `expected_failures` has for it, and what runs checks on it."""
    import pytest

    chosen = chosen_names(checks, known, stress=stress or COMMAND_LINE.stress)
    expected = expected_failures or {}
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
