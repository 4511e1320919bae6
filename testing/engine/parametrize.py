"""Checks as pytest cases."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hypothesis import core, settings

from ...registry import SeqmixError, choices_hint
from .check import Check
from .outcome import Outcomes, Status, chosen_names, known_names


@dataclass
class CommandLine:
    """Options from pytest's own command line (cli/pytest_plugin.py); they override those of the tests."""

    examples: int | None = None
    stress: bool = False


COMMAND_LINE = CommandLine()


@dataclass(frozen=True)
class BoundCheck:
    """A check bound to one mixer or kernel, as pytest passes it to a test."""

    name: str
    run: Callable[..., Outcomes]
    options: Mapping[str, Any]

    def __call__(self, **options: Any) -> None:
        """Run the check with these options in addition to the bound ones.

        Without an option, the number of examples is that of hypothesis' profile, and the seed is 0. Under
        `--hypothesis-seed`, or a profile of the user's project, hypothesis chooses the seed.

        Raises:
            SeqmixError: an option has to be given to the decorator instead (`checks`, `expected_failures`).
        """
        import pytest

        if misplaced := sorted({"checks", "expected_failures"} & options.keys()):
            raise SeqmixError(f"check() does not take {misplaced[0]}: pass it to the decorator instead")
        arguments = {"seed": _seed(), "examples": settings().max_examples, **self.options, **options}
        if COMMAND_LINE.examples is not None:
            arguments["examples"] = COMMAND_LINE.examples
        try:
            report = self.run(**arguments)
        except SeqmixError as error:  # the message suffices: a traceback would only show the kit
            pytest.fail(str(error), pytrace=False)
        if not report.outcomes:
            pytest.fail(f"expected {self.name} to run, got no outcome", pytrace=False)
        report_as = {Status.SKIPPED: pytest.skip, Status.EXPECTED_FAILURE: pytest.xfail}
        report_as[Status.FAILED] = partial(pytest.fail, pytrace=False)
        for outcome in report.outcomes:
            if outcome.status in report_as:
                report_as[outcome.status](outcome.reason)


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
    """Return pytest's decorator, with one test case per check and subject.

    Args:
        tested: the subjects, each with its label, its name in `expected_failures`, and the function that runs checks
            on it.
        known: all checks by name.
        what: the word for a subject in errors: "kind" or "kernel".
        checks: names of the checks to run; None for the default ones.
        stress: True to run the checks of `--stress` too, if `checks` is None.
        expected_failures: by subject, the checks that are known to fail, each with a reason.
        options: options of the function that runs the checks.

    Raises:
        SeqmixError: no check or subject has one of the names.
    """
    import pytest

    chosen = chosen_names(checks, known, stress=stress or COMMAND_LINE.stress)
    expected = expected_failures or {}
    names = dict.fromkeys(name for _, name, _ in tested)
    for name, failures in expected.items():
        if name not in names:
            allowed = choices_hint(name, names, "tested")
            raise SeqmixError(
                f"expected_failures may name only {what}s that are tested here, got the {what} {name!r}{allowed}"
            )
        known_names(failures, known)
    cases = []
    for label, name, run in tested:
        for check in chosen:
            failures = expected.get(name, {})
            reasons = {check: failures[check]} if check in failures else {}
            bound = BoundCheck(check, partial(run, checks=[check], expected_failures=reasons), options)
            cases.append(pytest.param(bound, id=f"{label}-{check}"))
    return pytest.mark.parametrize("check", cases)


def _seed() -> int | None:
    """Return the seed of the cases: 0, so that a suite that passes keeps passing.

    None leaves the seed to hypothesis: under `--hypothesis-seed`, and under a profile of the user's project, such as
    one that draws new cases every night.
    """
    # hypothesis' pytest plugin stores the option in `core`; older versions have no function for the profile's name
    forced, profile = getattr(core, "global_force_seed", None), getattr(settings, "_current_profile", "default")
    return 0 if forced is None and profile in ("default", "ci") else None
