"""torch.compile: one graph, whatever the data."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from ...mixers.state import clone, concatenate, to_dict
from ...registry import SeqmixError
from ..check import check, compilable, packing, recurrent, stateful
from ..compare import CheckFailure, require
from ..mixer.case import Draw
from ..mixer.subject import BACKEND
from ..mixer.trial import Trial

NOTHING = Draw(tokens=(7, 7), batch_size=(2, 2), starts=("none",), uses=("training",))
STATE = Draw(tokens=(7, 7), batch_size=(2, 2), starts=("read",))
PACKED = Draw(pieces=(3, 3), tokens=(3, 3), batch_size=(1, 1), starts=("read",), uses=("truncated",))
MANY = Draw(tokens=(12, 12), batch_size=(2, 2), starts=("none",))
PREFIX = 5
"""Tokens before a segment that is compiled: of a cache that holds none, a mistake is not seen."""

SIZES = Draw(pieces=(2, 2), tokens=(4, 4), batch_size=(1, 1), starts=("none",), uses=("training",))


@check(compilable, use="training with torch.compile", share=0, draw=NOTHING, compiles=True)
def training_compiles_into_one_graph(trial: Trial) -> None:
    """Training, forward and backward, compiles with fullgraph in every paradigm, gives what eager gives, and recompiles
    for no data."""
    for paradigm in trial.paradigms:
        _compiles(trial, trial.used(paradigm))


@check(
    stateful,
    compilable,
    use="prefill and truncated backpropagation with torch.compile",
    share=0,
    draw=STATE,
    compiles=True,
)
def segments_compile_into_one_graph(trial: Trial) -> None:
    """A segment from a state, with the final state and gradients through both, compiles with fullgraph."""
    _compiles(trial, trial.call())


@check(compilable, packing, use="packed training with torch.compile", share=0, draw=PACKED, compiles=True)
def packing_compiles_into_one_graph(trial: Trial) -> None:
    """Packed training, from states and with final states and with neither, compiles with fullgraph and does not
    recompile for other boundaries, empty documents included."""
    boundaries = [_cuts(trial, cuts) for cuts in ((0, 3, 6, 9), (0, 0, 5, 9), (0, 9, 9, 9), (0, 3, 3, 9))]

    def function(x: Tensor, state: Any, **options: Any) -> tuple[Tensor, Any]:
        unwanted, _ = trial.call(mixer=trial.mixer_in_use, **{**options, "return_state": False})(x, None)
        y, after = trial.used(**options)(x, state)
        return torch.cat((y, unwanted), dim=-1), after

    _compiles(trial, function, boundaries)


@check(
    compilable,
    use="compiled training or evaluation where lengths, batches or documents change",
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
    counter = CompileCounterWithBackend("eager" if asked == BACKEND else asked)
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
        with _one_graph():
            actual = trial.differentiate(partial(compiled, **options), x, None)
        what = f"compiled against eager, {list(x.shape)} after other sizes"
        trial.compare(f"{what}, documents {options['cu_seqlens'].tolist()}" if options else what, actual, expected)
        if packs and number == 1:
            graphs = f"other boundaries of as many documents and tokens compiled {counter.frame_count} graphs"
            require(counter.frame_count == 1, f"{graphs}: something depends on data")


def _backend(trial: Trial) -> str:
    """`aot_eager` cuts into forward and backward by inductor's rules, which take half a second to import."""
    asked = trial.subject.compile_backend
    return "aot_eager_default_partitioner" if asked == "aot_eager" else asked


def _cuts(trial: Trial, cuts: tuple[int, ...]) -> Tensor:
    return torch.tensor(cuts, device=trial.subject.device)


def _compiles(trial: Trial, function: Callable[..., Any], boundaries: Sequence[Tensor | None] = (None, None)) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(_backend(trial))
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for cuts in boundaries:
        options = {} if cuts is None else {"cu_seqlens": cuts}
        x, state = trial.tokens(), _before(trial, trial.case.batch_size if cuts is None else len(cuts) - 1)
        expected = trial.differentiate(partial(function, **options), x, state)
        with _one_graph():
            actual = trial.differentiate(partial(compiled, **options), x, state)
        trial.compare("compiled against eager", actual, expected)
    count = counter.frame_count
    require(count == 1, f"{len(boundaries)} calls of equal shapes compiled {count} graphs: something depends on data")


def _before(trial: Trial, rows: int) -> Any:
    """What comes before, where the case begins from a state: as many tokens at every call, so that shapes are equal,
    and rows that differ, so that it is seen which row a document has, also in how much they have read if they may."""
    traits = trial.mixer.traits
    if trial.case.start == "none" or not traits.has_state:
        return None
    if traits.state == "growing" or not _rows_may_differ(trial):
        return trial.mix(trial.tokens(rows, PREFIX), None)[1]
    return concatenate([trial.mix(trial.tokens(1, PREFIX + row), None)[1] for row in range(rows)])


@check(
    stateful,
    compilable,
    recurrent,
    use="decoding with torch.compile: it compiles at every token",
    share=0,
    draw=Draw(tokens=(12, 12), batch_size=(2, 2), starts=("none",)),
    compiles=True,
)
def decoding_compiles_once(trial: Trial) -> None:
    """A step compiles with fullgraph, once for all tokens, and is the whole of rows that have read different numbers of
    tokens; a growing state for which nothing is allocated, whatever `max_length`, may take further graphs, as its sizes
    are others at every token."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(_backend(trial))
    step = torch.compile(trial.mixer.step, fullgraph=True, backend=counter)
    x = trial.tokens()
    with _one_graph(), torch._dynamo.config.patch(recompile_limit=2 * x.shape[1]):
        state, expected = _read_before(trial, x)
        sizes = _sizes(state)
        y, after = trial.decode(x, state, step)
    trial.compare("compiled steps against the whole", (y, None), (expected, None))
    count = f"{x.shape[1]} steps compiled {counter.frame_count} graphs"
    once = counter.frame_count == 1 or (trial.mixer.traits.state == "growing" and _sizes(after) != sizes)
    require(once, f"{count}: something that changes with every token is not a tensor")


def _read_before(trial: Trial, x: Tensor) -> tuple[Any, Tensor]:
    """What rows have read before x, the first nothing, the others more and more where that may differ, with room for x;
    and the outputs of x."""
    room = x.shape[1] + PREFIX * len(x)
    with torch.no_grad():  # a beginning that is learned has a graph, and what follows has none
        state, states = trial.mixer.init_state(len(x), max_length=x.shape[1]), []
        for row in range(len(x) if _rows_may_differ(trial) else 0):
            nothing = trial.mixer.init_state(1, max_length=room)
            states.append(trial.mix(trial.tokens(1, PREFIX * row), nothing)[1] if row else nothing)
        try:
            state = concatenate(states) if states else state
        except SeqmixError:  # caches for which nothing is allocated, whatever `max_length`
            states = []
    if not states:
        return state, trial.mix(x, None)[0]
    return state, torch.cat([trial.mix(x[row : row + 1], before)[0] for row, before in enumerate(states)])


def _rows_may_differ(trial: Trial) -> bool:
    return "rows" not in getattr(trial.mixer, "undeclared", {})


def _sizes(state: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in to_dict(state).values()]


@check(compilable, use="deployment: an exported model is another", share=0, draw=STATE, compiles=True)
def exported_graphs_are_the_mixer(trial: Trial) -> None:
    """`torch.export` of a segment, from a state and with its final state, gives what the mixer gives for other
    numbers."""
    x, state = trial.tokens(), _before(trial, trial.case.batch_size)
    wanted = trial.mixer.traits.has_state
    given = trial.after(None) if state is not None else trial.mixer.paradigm

    class Segment(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = trial.mixer

        def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            return self.mixer(x, state, paradigm=given, return_state=wanted)

    with _one_graph(), torch.no_grad():
        exported = torch.export.export(Segment(), (x, state)).module()
    x, state = trial.tokens(), _before(trial, trial.case.batch_size)
    with torch.no_grad():
        found = exported(x, None if state is None else clone(state))
    trial.compare("exported against the mixer", found, trial.mix(x, state, paradigm=given))


@contextmanager
def _one_graph():
    try:
        yield
    except Exception as error:  # the compiler's have no base of their own
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckFailure(f"does not compile into one graph: {type(error).__name__}: {reason}") from error
