"""The engine of mixer and kernel checks: it runs checks on drawn cases and reports a small failing case."""

import gc
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Generic, Self, TypeVar

import torch
from hypothesis.strategies import SearchStrategy

from ...registry import SeqmixError
from ..memory_limit import MAX_BYTES
from .check import Check
from .outcome import CheckOutcome, Status, chosen_names, known_names
from .search import describe_error, search

EXAMPLES = 100
"""Default number of requested examples; each check runs a share of them."""

ALONE = "This case passes when run alone on a new {what}: the result depends on earlier calls or on chance."
"""Note in the report of a failure that cannot be reproduced from its case."""

C = TypeVar("C")


class CheckedSubject(ABC, Generic[C]):
    """A mixer or kernel under test, as the engine uses it; `C` is the class of its cases."""

    what: str
    """Word for the subject in reports: "mixer" or "kernel"."""
    name: str
    """Name in reports."""
    notes: dict[str, None]
    """Warnings of the running check, each once, in order."""

    @abstractmethod
    def skip_reason(self, check: Check) -> str | None:
        """Return why a check does not apply; None if it applies."""

    @abstractmethod
    def cases(self, check: Check) -> SearchStrategy[C]:
        """Return the strategy that draws cases."""

    def fixed_cases(self, check: Check) -> list[C]:  # noqa: ARG002
        """Return cases that always run, after the drawn ones."""
        return []

    @abstractmethod
    def attempt(self, check: Check, case: C) -> None:
        """Run a check on a case; raise an exception if the property does not hold."""

    @abstractmethod
    def simpler(self, check: Check, case: C) -> Iterable[C]:
        """Return cases that are simpler in one respect, the simplest first; the subject may refuse some of them."""

    def renew(self) -> Self:
        """Return an equal subject that has not been called yet."""
        return self

    @abstractmethod
    def script(self, check: Check, case: C | None, **run_options: Any) -> Iterable[str]:
        """Return lines of Python that run a check on a case; without a case, on all cases.

        `run_options` has the arguments `examples` and `seed` of the run, which determine all its cases.
        """


def sample_evenly(fixed: list[C], examples: int) -> list[C]:
    """Return all fixed cases, or an evenly spread share of them if fewer than `EXAMPLES` examples are requested."""
    share = min(examples, EXAMPLES)
    return [case for i, case in enumerate(fixed) if (i + 1) * share // EXAMPLES > i * share // EXAMPLES]


def run_checks(
    tested: CheckedSubject,
    known: Mapping[str, Check],
    *,
    checks: Iterable[str] | None,
    expected_failures: Mapping[str, str] | None,
    examples: int,
    seed: int | None,
    shrink: bool,
    compiles: bool = True,
    stress: bool = False,
    on_outcome: Callable[[CheckOutcome], None] | None = None,
    on_case: Callable[[Any, int], None] | None = None,
) -> list[CheckOutcome]:
    """Run checks on a subject and return their outcomes; `known` has all checks by name.

    The other arguments, and the errors, are those of `check_mixer`.
    """
    expected = dict(expected_failures or {})
    known_names(expected, known)
    names = chosen_names(checks, known, stress=stress)
    causes: dict[str, str] = {}
    if not isinstance(examples, int) or isinstance(examples, bool) or examples < 1:
        raise SeqmixError(f"examples must be an integer >= 1, got {examples!r}")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise SeqmixError(f"seed must be an integer >= 0 or None, got {seed!r}")
    outcomes = []
    run_options = {"examples": examples, "seed": seed}
    with _cheap_garbage_collection():
        for check in (known[name] for name in names):
            reason = tested.skip_reason(check)
            if reason is None and check.compiles and not compiles:
                reason = "checks that compile are turned off"
            if reason is not None:
                outcome = CheckOutcome(check, Status.SKIPPED, reason)
            else:
                report_case = None if on_case is None else partial(on_case, check)
                outcome = _run(tested, check, run_options, shrink, expected.get(check.name), report_case, causes)
            outcomes.append(outcome)
            if on_outcome is not None:
                on_outcome(outcome)
    return outcomes


def _run(
    tested: CheckedSubject,
    check: Check,
    run_options: dict[str, Any],
    shrink: bool,
    expected: str | None,
    on_case: Callable[[int], None] | None,
    causes: dict[str, str],
) -> CheckOutcome:
    """Run one check on the drawn and the fixed cases.

    `causes` maps each cause of a failure (`cause_of`) to the first check that reported it; a new cause is added.
    """
    started = time.perf_counter()
    tested.notes = {}
    with _one_thread():
        result = search(
            partial(tested.attempt, check),
            tested.cases(check),
            examples=check.examples(run_options["examples"]),
            seed=run_options["seed"],
            fixed=tested.fixed_cases(check),
            simpler=partial(tested.simpler, check) if shrink and expected is None else None,
            on_case=on_case,
        )
        fails_alone = True
        if result.case is not None and expected is None:
            with suppress(Exception):
                tested.renew().attempt(check, result.case)
                fails_alone = False
    notes = list(tested.notes)
    if result.too_large is not None:
        notes.append(f"left out: {result.too_large!r} needs more than {MAX_BYTES / 2**30:g} GiB of memory")
    measured: dict[str, Any] = {
        "examples": result.examples,
        "seconds": time.perf_counter() - started,
        "case": result.case,
        "notes": tuple(notes),
    }
    if result.error is None and expected is not None:
        sentence = f"expected {check.name} to fail ({expected}), but it passed: remove it from expected_failures"
        return CheckOutcome(check, Status.FAILED, sentence, **measured)
    if expected is not None:
        return CheckOutcome(check, Status.EXPECTED_FAILURE, expected, **measured)
    if result.error is None:
        nothing_ran = bool(notes) and not result.examples
        if nothing_ran:
            return CheckOutcome(check, Status.SKIPPED, notes[-1], **measured)
        return CheckOutcome(check, Status.PASSED, **measured)
    difference = describe_error(result.error)
    first = causes.setdefault(cause_of(difference), check.name)
    if first != check.name:
        sentence = f"fails for the same cause as {first}: {difference.splitlines()[0]}"
        return CheckOutcome(check, Status.FAILED, sentence, same_as=first, **measured)
    script: tuple[str, ...] = ()
    if result.case is not None:
        script = tuple(tested.script(check, result.case) if fails_alone else tested.script(check, None, **run_options))
    heading = "To reproduce:" if fails_alone else f"{ALONE.format(what=tested.what)}\nTo run all cases again:"
    lines = [difference, heading, *(f"    {line}" for line in script)] if script else [difference]
    lines += [f"{check.name}: {check.property}"]
    lines += [f"Affected use: {check.use}"] if check.use else []
    lines += [f"If this is intended: {check.remedy}"] if check.remedy else []
    return CheckOutcome(check, Status.FAILED, "\n".join(lines), script=script, **measured)


def cause_of(difference: str) -> str:
    """Return a key that failures of the same cause share: the error and its line, or the message without numbers."""
    if (raised := re.search(r"raised \w+: .*", difference)) is not None:
        return raised[0]
    return re.sub(r"[-+\d.]+(e[-+]\d+)?", "N", difference)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: for the small tensors of cases, threads cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _cheap_garbage_collection() -> Iterator[None]:
    """Collect garbage less often, and only among new objects.

    With torch imported, one collection of all objects takes longer than a case.
    """
    frozen, thresholds = gc.get_freeze_count(), gc.get_threshold()
    if not frozen:  # unfreezing afterwards would undo the caller's own freeze
        gc.freeze()
    gc.set_threshold(thresholds[0] and max(thresholds[0], 20_000), *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if not frozen:
            gc.unfreeze()


@contextmanager
def strict_numerics() -> Iterator[None]:
    """Fill uninitialised memory with NaN and compute float32 products without TF32; restore both afterwards."""
    mode = torch.get_deterministic_debug_mode()
    settings: Any = torch.utils.deterministic  # typed Any: the module's class has the attribute
    fill, precision = settings.fill_uninitialized_memory, torch.get_float32_matmul_precision()
    with ExitStack() as after:
        after.callback(torch.set_deterministic_debug_mode, mode)
        after.callback(setattr, settings, "fill_uninitialized_memory", fill)
        after.callback(torch.set_float32_matmul_precision, precision)
        # in this mode, torch fills the tensors of `empty` with NaN, and integer ones with their largest number;
        # `torch.use_deterministic_algorithms` does the same, but imports torch's compiler, which takes seconds
        torch.set_deterministic_debug_mode("warn")
        settings.fill_uninitialized_memory = True
        torch.set_float32_matmul_precision("highest")
        yield
