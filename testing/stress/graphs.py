"""Checks of torch.compile for segments, packed rows and changing sizes."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..check import NOT_COMPILED, check, compilable, packing, stateful
from ..compare import require
from ..mixer.case import Draw
from ..mixer.compiled import compiler_errors_as_failures, counting_backend, require_one_graph
from ..mixer.subject import BACKEND
from ..mixer.trial import Trial

STATE = Draw(tokens=(7, 7), batch_size=(2, 2), starts=("read",))


PACKED = Draw(pieces=(3, 3), tokens=(3, 3), batch_size=(1, 1), starts=("read",), uses=("truncated",))


SIZES = Draw(pieces=(2, 2), tokens=(4, 4), batch_size=(1, 1), starts=("none",), uses=("training",))


@check(
    stateful,
    compilable,
    stress=True,
    use="prefill and truncated backpropagation with torch.compile: errors, or one compilation per call",
    remedy=NOT_COMPILED,
    share=0,
    draw=STATE,
    compiles=True,
)
def segments_compile_into_one_graph(trial: Trial) -> None:
    """A segment from a state compiles with `fullgraph=True` in every paradigm, with its final state and with gradients
    through both states."""
    for paradigm in trial.paradigms:
        require_one_graph(trial, trial.call(paradigm))


@check(
    compilable,
    packing,
    stress=True,
    use="packed training with torch.compile: errors, or one compilation per batch",
    remedy=NOT_COMPILED,
    share=0,
    draw=PACKED,
    compiles=True,
)
def packing_compiles_into_one_graph(trial: Trial) -> None:
    """Packed training compiles with `fullgraph=True`, with initial and final states and without either. It does not
    recompile for other boundaries, also with empty documents."""
    boundaries = [_cu_seqlens(trial, ends) for ends in ((0, 3, 6, 9), (0, 0, 5, 9), (0, 9, 9, 9), (0, 3, 3, 9))]

    def function(x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        stateless, _ = trial.call(mixer=trial.mixer_in_use, **{**options, "return_state": False})(x, None)
        y, after = trial.used(**options)(x, state)
        return torch.cat((y, stateless), dim=-1), after

    require_one_graph(trial, function, boundaries)


@check(
    compilable,
    stress=True,
    use="compiled training or evaluation with changing lengths, batches or documents: results are wrong",
    remedy=NOT_COMPILED,
    share=0,
    draw=SIZES,
    compiles=True,
)
def graphs_follow_sizes(trial: Trial) -> None:
    """A compiled mixer gives the results of eager mode for other numbers of tokens and packed documents (or rows, if
    the mixer cannot pack). The compiler may make further graphs for them, but not if boundaries change while the
    numbers of documents and tokens stay the same."""
    packs = trial.mixer.traits.packing

    def function(x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        return trial.used(**options)(x, state)

    torch._dynamo.reset()
    # tracing the forward pass is enough to find sizes that a graph holds fixed; other checks trace the backward pass
    backend = trial.subject.compile_backend
    counter = counting_backend("eager" if backend == BACKEND else backend)
    graph = torch.compile(function, fullgraph=True, backend=counter)

    def compiled(x: Tensor, state: Any, **options: Tensor) -> tuple[Tensor, Any]:
        # dynamic sizes from the first call on: by itself, the compiler tries them at the second call
        for tensor, axis in ((x, 1), *((ends, 0) for ends in options.values())) if packs else ((x, 0), (x, 1)):
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
        return graph(x, state, **options)

    # a graph that holds a size fixed is wrong for the next sizes
    calls: list[tuple[Tensor, dict[str, Tensor]]] = [
        (trial.tokens(1, ends[-1]), {"cu_seqlens": _cu_seqlens(trial, ends)})
        for ends in ((0, 3, 9), (0, 5, 9), (0, 2, 9, 9, 14))
    ]
    if not packs:
        calls = [(trial.tokens(rows, length), {}) for rows, length in ((2, 9), (4, 14))]
    for number, (x, options) in enumerate(calls):
        expected = trial.differentiate(partial(function, **options), x, None)
        with compiler_errors_as_failures():
            actual = trial.differentiate(partial(compiled, **options), x, None)
        what = f"compiled against eager, {list(x.shape)} after other sizes"
        trial.compare(f"{what}, documents {options['cu_seqlens'].tolist()}" if options else what, actual, expected)
        if packs and number == 1:
            graphs = f"expected 1 graph for all boundaries of 2 documents, got {counter.frame_count}"
            require(counter.frame_count == 1, f"{graphs}: the graph depends on their values")


def _cu_seqlens(trial: Trial, ends: tuple[int, ...]) -> Tensor:
    return torch.tensor(ends, device=trial.subject.device)
