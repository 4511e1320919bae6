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
from .shrink import shrink

C = TypeVar("C")

FLAKY = "the same case passed once and failed once: the result is not a function of its arguments. When it failed:"


class Found(NamedTuple, Generic[C]):
    """What a search found."""

    error: Exception | None
    """Of the case; None if nothing raised."""
    case: C | None
    """The case on which it raised, reduced where that was asked for."""
    examples: int
    """Cases run until one raised, that one included; neither those that are not possible nor those of shrinking."""


def search(
    attempt: Callable[[C], None],
    cases: SearchStrategy[C],
    *,
    examples: int,
    seed: int | None,
    fixed: Iterable[C] = (),
    simpler: Callable[[C], Iterable[C]] | None = None,
    on_case: Callable[[int], None] | None = None,
) -> Found[C]:
    """Try cases until one raises, at most `examples`; then the fixed ones; and of one that raised, simpler ones.

    A seed of None leaves the cases to hypothesis. `simpler` gives simpler cases than the one that raised; None leaves
    it as it was found. `on_case` is called with the number of cases tried, after each.
    """
    tried = passed = 0
    failed: list[tuple[C, Exception]] = []
    # hypothesis' objects refer to each other and so live until garbage is collected: not with what is attempted, which
    # holds every mixer and tensor of a check
    held = [attempt]

    def once(case: C) -> None:
        nonlocal tried, passed
        tried += 1
        try:
            held[0](case)
        except UnsatisfiedAssumption:  # not a case
            raise
        except Exception as error:
            failed.append((case, error))
            raise
        finally:
            if on_case is not None:
                on_case(tried)
        if not failed:
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
    try:
        with without:
            (run if seed is None else with_seed(seed)(run))()
        for case in fixed:
            with suppress(UnsatisfiedAssumption):
                once(case)
    except Unsatisfiable:
        text = f"none of the {tried} cases drawn can be run: the configuration refuses the options of every one"
        return Found(CheckFailure(text), None, 0)
    except Flaky:  # with what hypothesis says of it, which is for authors of strategies
        if not failed:
            raise
        case, error = failed[-1]
        return Found(CheckFailure(f"{FLAKY}\n{describe_error(error)}"), case, passed + 1)
    except Exception as error:
        if not failed:
            return Found(error, None, passed)
        case = failed[-1][0]
        if simpler is not None:
            case, error = shrink(once, case, error, simpler)
        return Found(error, case, passed + 1)
    finally:
        held.clear()
    return Found(None, None, passed)


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
