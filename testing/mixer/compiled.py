"""Comparison of a compiled mixer with the same mixer in eager mode."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...mixers.base.state import concatenate
from ..compare import CheckFailure, require
from .trial import Trial

PREFIX = 5
"""Number of tokens before a compiled segment: an empty cache would hide mistakes."""


def counting_backend(name: str) -> Any:
    """Return a compiler backend that counts graphs. Its import takes a second, so it is inside the function."""
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend(name)


def backend_of(trial: Trial) -> str:
    """Return the name of the compiler backend.

    For `aot_eager`, it is the variant with the default partitioner: the usual one imports inductor, which takes half a
    second.
    """
    backend = trial.subject.compile_backend
    return "aot_eager_default_partitioner" if backend == "aot_eager" else backend


def require_one_graph(
    trial: Trial,
    function: Callable[..., Any],
    boundaries: Sequence[Tensor | None] = (None, None),
) -> None:
    """Fail unless all calls share one compiled graph, and give the results and gradients of eager mode.

    Args:
        trial: the case.
        function: the function to compile: of tokens, state and `cu_seqlens`.
        boundaries: `cu_seqlens` of each call; None for a call without packing.
    """
    torch._dynamo.reset()
    counter = counting_backend(backend_of(trial))
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for cu_seqlens in boundaries:
        options = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        rows = trial.case.batch_size if cu_seqlens is None else len(cu_seqlens) - 1
        x, state = trial.tokens(), state_before(trial, rows)
        expected = trial.differentiate(partial(function, **options), x, state)
        with compiler_errors_as_failures():
            actual = trial.differentiate(partial(compiled, **options), x, state)
        trial.compare("compiled against eager", actual, expected)
    count = counter.frame_count
    require(
        count == 1,
        f"expected {len(boundaries)} calls of equal shapes to compile 1 graph, got {count}: "
        "the graph depends on the values of tensors",
    )


def state_before(trial: Trial, rows: int) -> Any:
    """Return the state that a compiled call begins from; None if the case begins without one.

    Its shapes are the same at every call. Rows have different values, so that mixed-up rows are found. If the mixer
    allows it, they have processed different numbers of tokens too.
    """
    traits = trial.mixer.traits
    if trial.case.start == "none" or not traits.has_state:
        return None
    if traits.state == "growing" or not rows_may_differ(trial):
        return trial.mix(trial.tokens(rows, PREFIX), None)[1]
    return concatenate([trial.mix(trial.tokens(1, PREFIX + row), None)[1] for row in range(rows)])


def rows_may_differ(trial: Trial) -> bool:
    """Return True if rows of one state may have processed different numbers of tokens."""
    return "rows" not in getattr(trial.mixer, "undeclared", {})


@contextmanager
def compiler_errors_as_failures() -> Iterator[None]:
    """Turn an error of the compiler into a `CheckFailure`."""
    try:
        yield
    except Exception as error:  # the compiler's errors share no base class
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckFailure(f"does not compile into one graph: {type(error).__name__}: {reason}") from error
