"""Search for a small case on which a check raises, and describe the error."""

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar, cast
from unittest.mock import patch

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as with_seed
from hypothesis.errors import Flaky, Unsatisfiable, UnsatisfiedAssumption
from hypothesis.internal.conjecture.providers import HypothesisProvider
from hypothesis.strategies import SearchStrategy

from ...registry import where_raised
from ..compare import CheckFailure
from ..memory_limit import MemoryBoundError
from .shrink import shrink

C = TypeVar("C")

FLAKY = "the same case passed once and failed once: the result is not a function of its arguments. The failure:"
"""First line of the report of a flaky failure."""


class SearchResult(NamedTuple, Generic[C]):
    """Result of the search for a failing case."""

    error: Exception | None
    """Error of the failing case; None if no case failed."""
    case: C | None
    """The failing case, reduced if requested; None if no case failed."""
    examples: int
    """Number of cases run, up to and including the first failure, without refused cases and those of the reduction."""
    too_large: C | None = None
    """A case that was left out because it needs more memory than a case may take; None without such a case."""


def search(
    attempt: Callable[[C], None],
    cases: SearchStrategy[C],
    *,
    examples: int,
    seed: int | None,
    fixed: Iterable[C] = (),
    simpler: Callable[[C], Iterable[C]] | None = None,
    on_case: Callable[[int], None] | None = None,
) -> SearchResult[C]:
    """Run drawn cases, at most `examples`, then the fixed ones, until a case fails; then reduce that case.

    Args:
        attempt: runs a case; raises if it fails.
        cases: draws cases.
        examples: the maximum number of drawn cases.
        seed: seed of the drawn cases; None leaves it to hypothesis.
        fixed: cases that run after the drawn ones.
        simpler: returns the simpler cases to try in place of a failing one; None reports the failing case as it is.
        on_case: called after each case, with the number of cases so far.
    """
    count = passed = 0
    failures: list[tuple[C, Exception]] = []
    too_large: list[C] = []
    # `attempt` holds every mixer and tensor of a check. hypothesis' objects form cycles and live until garbage is
    # collected: they reach `attempt` only through this list, which is cleared at the end
    attempts = [attempt]

    def run_case(case: C) -> None:
        nonlocal count, passed
        count += 1
        try:
            attempts[0](case)
        except UnsatisfiedAssumption:  # the subject refuses this case
            raise
        except MemoryBoundError as error:
            too_large.append(case)
            raise UnsatisfiedAssumption from error
        except Exception as error:
            failures.append((case, error))
            raise
        finally:
            if on_case is not None:
                on_case(count)
        if not failures:
            passed += 1

    options = settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=cast("Collection[HealthCheck]", list(HealthCheck)),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        print_blob=False,
    )
    run = options(given(case=cases)(run_case))
    # hypothesis also draws constants that it reads from the source of the imported modules, so the cases of a seed
    # would depend on earlier tests and on plug-ins. No public setting turns this off; a test fails if the name goes
    no_constants = patch.object(HypothesisProvider, "_maybe_draw_constant", lambda *_, **__: None, create=True)
    first_too_large = lambda: too_large[0] if too_large else None  # noqa: E731
    try:
        with no_constants:
            (run if seed is None else with_seed(seed)(run))()
        for case in fixed:
            with suppress(UnsatisfiedAssumption):
                run_case(case)
    except Unsatisfiable:
        if too_large:
            return SearchResult(None, None, 0, first_too_large())
        text = f"none of {count} cases could run: the configuration refuses the options of every case"
        return SearchResult(CheckFailure(text), None, 0)
    except Flaky:  # its message addresses authors of strategies
        if not failures:
            raise
        case, error = failures[-1]
        return SearchResult(CheckFailure(f"{FLAKY}\n{describe_error(error)}"), case, passed + 1)
    except Exception as error:
        if not failures:
            return SearchResult(error, None, passed)
        case = failures[-1][0]
        if simpler is not None:
            case, error = shrink(run_case, case, error, simpler)
        return SearchResult(error, case, passed + 1)
    finally:
        attempts.clear()
    return SearchResult(None, None, passed, first_too_large())


def describe_error(error: Exception) -> str:
    """Return the message of a check's failure; for any other exception, the line of `where_raised`."""
    return str(error) if isinstance(error, CheckFailure) else where_raised(error)
