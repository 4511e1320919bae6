"""torch.compile of segments, packed rows and sizes that change."""

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
    use="prefill and truncated backpropagation with torch.compile",
    remedy=NOT_COMPILED,
    share=0,
    draw=STATE,
    compiles=True,
)
def segments_compile_into_one_graph(trial: Trial) -> None:
    """A segment from a state, with the final state and gradients through both, compiles with fullgraph in every
    paradigm."""
    for paradigm in trial.paradigms:
        require_one_graph(trial, trial.call(paradigm))


@check(
    compilable,
    packing,
    stress=True,
    use="packed training with torch.compile",
    remedy=NOT_COMPILED,
    share=0,
    draw=PACKED,
    compiles=True,
)
def packing_compiles_into_one_graph(trial: Trial) -> None:
    """Packed training, from states and with final states and with neither, compiles with fullgraph and does not
    recompile for other boundaries, empty documents included."""
    boundaries = [_cuts(trial, cuts) for cuts in ((0, 3, 6, 9), (0, 0, 5, 9), (0, 9, 9, 9), (0, 3, 3, 9))]

    def function(x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        unwanted, _ = trial.call(mixer=trial.mixer_in_use, **{**options, "return_state": False})(x, None)
        y, after = trial.used(**options)(x, state)
        return torch.cat((y, unwanted), dim=-1), after

    require_one_graph(trial, function, boundaries)


@check(
    compilable,
    stress=True,
    use="compiled training or evaluation where lengths, batches or documents change",
    remedy=NOT_COMPILED,
    share=0,
    draw=SIZES,
    compiles=True,
)
def graphs_follow_sizes(trial: Trial) -> None:
    """Compiled once, a mixer gives what eager gives for other numbers of tokens and packed documents (of rows,
    without packing), for which the compiler may make further graphs; not for other boundaries of as many."""
    packs = trial.mixer.traits.packing

    def function(x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        return trial.used(**options)(x, state)

    torch._dynamo.reset()
    # what holds a size is seen where forward is traced; other checks trace backward
    asked = trial.subject.compile_backend
    counter = counting_backend("eager" if asked == BACKEND else asked)
    graph = torch.compile(function, fullgraph=True, backend=counter)

    def compiled(x: Tensor, state: Any, **options: Tensor) -> tuple[Tensor, Any]:
        # from the first call on for any size: by itself, the compiler would do so at the second only
        for tensor, axis in ((x, 1), *((cuts, 0) for cuts in options.values())) if packs else ((x, 0), (x, 1)):
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
        return graph(x, state, **options)

    # a graph that holds a size is wrong at the next
    calls: list[tuple[Tensor, dict[str, Tensor]]] = [
        (trial.tokens(1, cuts[-1]), {"cu_seqlens": _cuts(trial, cuts)})
        for cuts in ((0, 3, 9), (0, 5, 9), (0, 2, 9, 9, 14))
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
            graphs = f"other boundaries of as many documents and tokens compiled {counter.frame_count} graphs"
            require(counter.frame_count == 1, f"{graphs}: something depends on data")


def _cuts(trial: Trial, cuts: tuple[int, ...]) -> Tensor:
    return torch.tensor(cuts, device=trial.subject.device)
