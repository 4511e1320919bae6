"""Looking for the smallest case on which something raises."""

import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar, cast

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as with_seed
from hypothesis.errors import Flaky
from hypothesis.strategies import SearchStrategy

from .compare import CheckFailure

C = TypeVar("C")


class Found(NamedTuple, Generic[C]):
    """What a search found."""

    error: Exception | None
    """Of the smallest case; None if nothing raised."""
    case: C | None
    """The smallest case on which it raised."""
    examples: int
    """Cases tried."""


def search(
    attempt: Callable[[C], None], cases: SearchStrategy[C], *, examples: int, seed: int | None, shrink: bool
) -> Found[C]:
    """Try cases until one raises, then smaller ones.

    Args:
        attempt: raises where something is wrong.
        cases: what is drawn from.
        examples: cases at most, before one raises.
        seed: of the cases; None lets hypothesis draw anew (or use its own seed).
        shrink: whether smaller cases are tried.
    """
    tried: list[C] = []

    @settings(
        max_examples=examples,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=cast("Collection[HealthCheck]", list(HealthCheck)),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        print_blob=False,
    )
    @given(case=cases)
    def run(case: C) -> None:
        tried.append(case)
        attempt(case)

    try:
        with _one_thread():
            (run if seed is None else with_seed(seed)(run))()
    except Flaky as error:
        text = f"the same case passed once and failed once: the result is not a function of its arguments\n{error}"
        return Found(CheckFailure(text), tried[-1], len(tried))
    except Exception as error:
        # the last case that hypothesis runs is the smallest
        return Found(error, tried[-1] if tried else None, len(tried))
    return Found(None, None, len(tried))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors of a case are small: threads would cost more than they save, and a multiple of it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def where_raised(error: Exception) -> str:
    """An exception that is not a check's own, and the line it came from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).strip().splitlines() or [""]
    return f"raised {type(error).__name__}: {text[0]} ({frame.filename}:{frame.lineno}, in {frame.name})"
