"""torch.compile: one graph, whatever the data."""

from contextlib import contextmanager
from functools import partial

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ..check import check, compilable, packing, recurrent
from ..compare import CheckFailure, require
from ..mixer_case import Draw
from ..mixer_trial import Trial

ONE = Draw(tokens=(7, 7), batch_size=(2, 2), starts=("initial",))
PACKED = Draw(pieces=(3, 3), tokens=(3, 3), batch_size=(1, 1), starts=("initial",))


@check(compilable, share=0, draw=ONE, compiles=True)
def training_compiles_into_one_graph(trial: Trial) -> None:
    """Forward and backward compile with fullgraph, give what eager gives, and recompile for no data."""
    _compiles(trial, trial.call())


@check(compilable, packing, share=0, draw=PACKED, compiles=True)
def packing_compiles_into_one_graph(trial: Trial) -> None:
    """Packed training compiles with fullgraph and does not recompile for other boundaries, empty documents included."""
    device = trial.subject.device
    boundaries = [torch.tensor(cuts, device=device) for cuts in ([0, 3, 6, 9], [0, 0, 5, 9], [0, 9, 9, 9])]
    # the state of a growing cache has its own shape for every packing: only the output is compared
    _compiles(trial, lambda x, state, **options: (trial.call(**options)(x, state)[0], None), boundaries)


def _compiles(trial, function, boundaries=(None, None)):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(trial.subject.compile_backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    rows = trial.case.batch_size if boundaries[0] is None else len(boundaries[0]) - 1
    for cuts in boundaries:
        options = {} if cuts is None else {"cu_seqlens": cuts}
        x, state = trial.tokens(), trial.state(rows)
        expected = trial.differentiate(partial(function, **options), x, state)
        with _one_graph():
            actual = trial.differentiate(partial(compiled, **options), x, state)
        trial.compare("compiled against eager", actual, expected)
    count = counter.frame_count
    require(count == 1, f"{len(boundaries)} calls of equal shapes compiled {count} graphs: something depends on data")


@check(compilable, recurrent, share=0, draw=Draw(tokens=(12, 12), batch_size=(2, 2), starts=("none",)), compiles=True)
def decoding_compiles_once(trial: Trial) -> None:
    """A step from an allocated state compiles with fullgraph, once for all tokens."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(trial.subject.compile_backend)
    step = torch.compile(trial.mixer.step, fullgraph=True, backend=counter)
    x = trial.tokens()
    with _one_graph():
        y, _ = trial.decode(x, trial.mixer.init_state(len(x), max_length=x.shape[1]), step)
    trial.compare("compiled steps against the whole", (y, None), (trial.mix(x, None)[0], None))
    count = f"{x.shape[1]} steps compiled {counter.frame_count} graphs"
    require(counter.frame_count == 1, f"{count}: something that changes with every token is not a tensor")


@contextmanager
def _one_graph():
    try:
        yield
    except Exception as error:  # the compiler's have no base of their own
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckFailure(f"does not compile into one graph: {type(error).__name__}: {reason}") from error
