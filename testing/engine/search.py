"""Looking for a small case on which a check raises, and where it was raised."""

import sys
import traceback
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar, cast
from unittest.mock import patch

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as with_seed
from hypothesis.errors import Flaky, Unsatisfiable, UnsatisfiedAssumption
from hypothesis.internal.conjecture.providers import HypothesisProvider
from hypothesis.strategies import SearchStrategy

from ..compare import CheckFailure
from ..memory_limit import MemoryBoundError
from .shrink import shrink

C = TypeVar("C")

FLAKY = "the result is not a function of its arguments: the same case passed once and failed once. When it failed:"


class SearchResult(NamedTuple, Generic[C]):
    """How a search for a case that fails ended."""

    error: Exception | None
    """Of the case that failed; None if none did."""
    case: C | None
    """The case that failed, reduced where that was asked for."""
    examples: int
    """Cases run until one failed, that one included; neither impossible ones nor those of shrinking."""
    too_large: C | None = None
    """A case that asked for more memory than a case may take, and was left out."""


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
    """Run cases until one fails, at most `examples`; then the fixed ones; and of one that failed, simpler ones.

    A seed of None leaves the cases to hypothesis. `simpler` gives simpler cases than the one that failed; None leaves
    it as it is. `on_case` is called after each case, with the number of cases so far.
    """
    count = passed = 0
    failures: list[tuple[C, Exception]] = []
    too_large: list[C] = []
    # hypothesis' objects refer to each other and so live until garbage is collected: not with what is attempted, which
    # holds every mixer and tensor of a check
    held = [attempt]

    def once(case: C) -> None:
        nonlocal count, passed
        count += 1
        try:
            held[0](case)
        except UnsatisfiedAssumption:  # not a case
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
    run = options(given(case=cases)(once))
    # hypothesis mixes in numbers that it reads from the source of whatever modules are imported: with the same seed,
    # another test that ran before, or a plug-in, would make other cases. It has no setting for that; what is switched
    # off is not public: a test says if it has gone
    without = patch.object(HypothesisProvider, "_maybe_draw_constant", lambda *_, **__: None, create=True)
    large = lambda: too_large[0] if too_large else None  # noqa: E731
    try:
        with without:
            (run if seed is None else with_seed(seed)(run))()
        for case in fixed:
            with suppress(UnsatisfiedAssumption):
                once(case)
    except Unsatisfiable:
        if too_large:
            return SearchResult(None, None, 0, large())
        text = f"none of {count} cases could be run: the configuration refuses the options of every one"
        return SearchResult(CheckFailure(text), None, 0)
    except Flaky:  # with what hypothesis says of it, which is for authors of strategies
        if not failures:
            raise
        case, error = failures[-1]
        return SearchResult(CheckFailure(f"{FLAKY}\n{describe_error(error)}"), case, passed + 1)
    except Exception as error:
        if not failures:
            return SearchResult(error, None, passed)
        case = failures[-1][0]
        if simpler is not None:
            case, error = shrink(once, case, error, simpler)
        return SearchResult(error, case, passed + 1)
    finally:
        held.clear()
    return SearchResult(None, None, passed, large())


def describe_error(error: Exception) -> str:
    """What a check says of a failure; of another exception, what and where it was."""
    return str(error) if isinstance(error, CheckFailure) else where_raised(error)


def where_raised(error: Exception) -> str:
    """An exception that is not a check's own, and the line to look at: the last of the mixer's author, not of
    what that calls (torch, the ops of seqmix); of a built-in mixer, the last of seqmix below the kit."""
    frames = list(traceback.walk_tb(error.__traceback__))
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in frames]
    own = [i for i, name in enumerate(modules) if not name.startswith("hypothesis_")]  # a module that it makes up
    own = [i for i in own if modules[i].partition(".")[0] not in _NOT_THE_AUTHORS]
    ours = [i for i, name in enumerate(modules) if name.startswith("seqmix.") and not name.startswith(_THE_KIT)]
    frame, line = frames[(own or ours or [-1])[-1]]
    text = str(error).strip().splitlines() or [""]
    code = frame.f_code
    return f"raised {type(error).__name__}: {text[0]} ({code.co_filename}:{line}, in {code.co_name})"


_NOT_THE_AUTHORS = {*sys.stdlib_module_names, "hypothesis", "jaxtyping", "pydantic", "pydantic_core", "seqmix", "torch"}
_THE_KIT = ("seqmix.testing.", "seqmix.mixers.contract")
