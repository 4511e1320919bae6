"""A mixer that is compiled, against itself."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...mixers.state import concatenate
from ..compare import CheckFailure, require
from .trial import Trial

PREFIX = 5
"""Tokens before a segment that is compiled: of a cache that holds none, a mistake is not seen."""


def counting_backend(name: str) -> Any:
    """A backend of the compiler that counts graphs; imported where something compiles, for it takes a second."""
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend(name)


def backend_of(trial: Trial) -> str:
    """`aot_eager` cuts into forward and backward by inductor's rules, which take half a second to import."""
    asked = trial.subject.compile_backend
    return "aot_eager_default_partitioner" if asked == "aot_eager" else asked


def require_one_graph(
    trial: Trial,
    function: Callable[..., Any],
    boundaries: Sequence[Tensor | None] = (None, None),
) -> None:
    """Fail unless calls with these boundaries compile into one graph that gives what eager gives."""
    torch._dynamo.reset()
    counter = counting_backend(backend_of(trial))
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for cuts in boundaries:
        options = {} if cuts is None else {"cu_seqlens": cuts}
        x, state = trial.tokens(), state_before(trial, trial.case.batch_size if cuts is None else len(cuts) - 1)
        expected = trial.differentiate(partial(function, **options), x, state)
        with one_graph():
            actual = trial.differentiate(partial(compiled, **options), x, state)
        trial.compare("compiled against eager", actual, expected)
    count = counter.frame_count
    require(count == 1, f"{len(boundaries)} calls of equal shapes compiled {count} graphs: something depends on data")


def state_before(trial: Trial, rows: int) -> Any:
    """What comes before, where the case begins from a state: as many tokens at every call, so that shapes are equal,
    and rows that differ, so that it is seen which row a document has, also in how much they have read if they may."""
    traits = trial.mixer.traits
    if trial.case.start == "none" or not traits.has_state:
        return None
    if traits.state == "growing" or not rows_may_differ(trial):
        return trial.mix(trial.tokens(rows, PREFIX), None)[1]
    return concatenate([trial.mix(trial.tokens(1, PREFIX + row), None)[1] for row in range(rows)])


def rows_may_differ(trial: Trial) -> bool:
    """True if rows of one state may have read different numbers of tokens."""
    return "rows" not in getattr(trial.mixer, "undeclared", {})


@contextmanager
def one_graph() -> Iterator[None]:
    """Report an error of the compiler as a failure."""
    try:
        yield
    except Exception as error:  # the compiler's have no base of their own
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckFailure(f"does not compile into one graph: {type(error).__name__}: {reason}") from error
