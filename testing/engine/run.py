"""The engine of mixer and kernel checks: it runs them on drawn cases, and reports a small one that fails."""

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
from ..memory_limit import MOST
from .check import Check
from .outcome import CheckOutcome, Status, chosen_names, known_names
from .search import describe_error, search

EXAMPLES = 100
"""Examples asked for by default; each check takes its share."""

ALONE = "Alone and on a new {what} this case passes: the result depends on earlier calls, or on chance."

C = TypeVar("C")


class CheckedSubject(ABC, Generic[C]):
    """A mixer or kernel under test, and what the engine needs of it; `C` is the class of its cases."""

    what: str
    """"mixer" or "kernel"."""
    name: str
    """As reports have it."""
    notes: dict[str, None]
    """Warnings of the check that runs, each once."""

    @abstractmethod
    def skip_reason(self, check: Check) -> str | None:
        """Why a check does not apply."""

    @abstractmethod
    def cases(self, check: Check) -> SearchStrategy[C]:
        """What cases are drawn from."""

    def fixed_cases(self, check: Check) -> list[C]:  # noqa: ARG002
        """Cases that run in any case, after those drawn."""
        return []

    @abstractmethod
    def attempt(self, check: Check, case: C) -> None:
        """Run a check on a case; raises where its property does not hold."""

    @abstractmethod
    def simpler(self, check: Check, case: C) -> Iterable[C]:
        """Cases that are simpler in one respect, the best first; some may not be cases of what is tested."""

    def renewed(self) -> Self:
        """The same subject, not called before."""
        return self

    @abstractmethod
    def script(self, check: Check, case: C | None, **asked: Any) -> Iterable[str]:
        """Python that runs a check on a case, or on all that are drawn as was asked."""


def as_many_as_asked(fixed: list[C], examples: int) -> list[C]:
    """Of the fixed cases all, or where fewer examples are asked for than usual, as large a share, of every kind."""
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
    """Run checks, of those known, on what is tested; arguments and errors are those of `check_mixer`."""
    expected = dict(expected_failures or {})
    known_names(expected, known)
    names = chosen_names(checks, known, stress=stress)
    causes: dict[str, str] = {}
    if not isinstance(examples, int) or isinstance(examples, bool) or examples < 1:
        raise SeqmixError(f"examples needs an integer >= 1, and was given {examples!r}")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise SeqmixError(f"seed needs an integer >= 0, or None, and was given {seed!r}")
    outcomes, asked = [], {"examples": examples, "seed": seed}
    with _few_objects():
        for check in (known[name] for name in names):
            reason = tested.skip_reason(check)
            if reason is None and check.compiles and not compiles:
                reason = "it compiles, and compiling was left out"
            if reason is not None:
                outcome = CheckOutcome(check, Status.SKIPPED, reason)
            else:
                report_case = None if on_case is None else partial(on_case, check)
                outcome = _run(tested, check, asked, shrink, expected.get(check.name), report_case, causes)
            outcomes.append(outcome)
            if on_outcome is not None:
                on_outcome(outcome)
    return outcomes


def _run(
    tested: CheckedSubject,
    check: Check,
    asked: dict[str, Any],
    shrink: bool,
    expected: str | None,
    on_case: Callable[[int], None] | None,
    causes: dict[str, str],
) -> CheckOutcome:
    started = time.perf_counter()
    tested.notes = {}
    with _one_thread():
        result = search(
            partial(tested.attempt, check),
            tested.cases(check),
            examples=check.examples(asked["examples"]),
            seed=asked["seed"],
            fixed=tested.fixed_cases(check),
            simpler=partial(tested.simpler, check) if shrink and expected is None else None,
            on_case=on_case,
        )
        alone = True
        if result.case is not None and expected is None:
            with suppress(Exception):
                tested.renewed().attempt(check, result.case)
                alone = False
    notes = list(tested.notes)
    if result.too_large is not None:
        notes.append(f"left out: {result.too_large!r} asks for more than {MOST / 2**30:g} GiB of memory")
    about: dict[str, Any] = {"examples": result.examples, "seconds": time.perf_counter() - started}
    about |= {"case": result.case, "notes": tuple(notes)}
    if result.error is None and expected is not None:
        sentence = f"expected {check.name} to fail ({expected}), and it passed"
        return CheckOutcome(check, Status.FAILED, sentence, **about)
    if expected is not None:
        return CheckOutcome(check, Status.EXPECTED_FAILURE, expected, **about)
    if result.error is None:
        nothing_ran = bool(notes) and not result.examples
        if nothing_ran:
            return CheckOutcome(check, Status.SKIPPED, notes[-1], **about)
        return CheckOutcome(check, Status.PASSED, **about)
    difference = describe_error(result.error)
    first = causes.setdefault(cause_of(difference), check.name)
    if first != check.name:
        sentence = f"fails as {first} does: {difference.splitlines()[0]}"
        return CheckOutcome(check, Status.FAILED, sentence, same_as=first, **about)
    script: tuple[str, ...] = ()
    if result.case is not None:
        script = tuple(tested.script(check, result.case) if alone else tested.script(check, None, **asked))
    heading = "To reproduce:" if alone else f"{ALONE.format(what=tested.what)}\nTo run all cases again:"
    lines = [difference, heading, *(f"    {line}" for line in script)] if script else [difference]
    lines += [f"{check.name}: {check.property}"]
    lines += [f"Without it breaks: {check.use}"] if check.use else []
    lines += [f"If that is intended: {check.remedy}"] if check.remedy else []
    return CheckOutcome(check, Status.FAILED, "\n".join(lines), script=script, **about)


def cause_of(difference: str) -> str:
    """What makes two failures one: the line that raised; of a difference, its sentence without numbers."""
    if (raised := re.search(r"raised \w+: .*", difference)) is not None:
        return raised[0]
    return re.sub(r"[-+\d.]+(e[-+]\d+)?", "N", difference)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors of a case are small: threads would cost more than they save, and a multiple of it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _few_objects() -> Iterator[None]:
    """What there was before is not searched for garbage: with torch's modules, that takes longer than a case. What a
    compiler makes is searched more seldom than by default."""
    frozen, thresholds = gc.get_freeze_count(), gc.get_threshold()
    if not frozen:  # what somebody froze stays so, and what a check leaves would as well
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
    """Uninitialised memory is NaN, float32 products are not TF32; both as before afterwards."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # a module whose class has the attribute
    fill, precision = memory.fill_uninitialized_memory, torch.get_float32_matmul_precision()
    with ExitStack() as after:
        after.callback(torch.use_deterministic_algorithms, deterministic, warn_only=warn_only)
        after.callback(setattr, memory, "fill_uninitialized_memory", fill)
        after.callback(torch.set_float32_matmul_precision, precision)
        # torch fills what `empty` returns with NaN (and integers with their largest) in this mode
        torch.use_deterministic_algorithms(True, warn_only=True)
        memory.fill_uninitialized_memory = True
        torch.set_float32_matmul_precision("highest")
        yield
