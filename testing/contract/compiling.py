"""Checks of torch.compile: training and decoding compile into one graph, whatever the data."""

from typing import Any

import torch
from torch import Tensor

from ...mixers.base.state import concatenate, to_dict
from ...registry import SeqmixError
from ..check import NOT_COMPILED, check, compilable, recurrent, stateful
from ..compare import require
from ..mixer.case import Draw
from ..mixer.compiled import (
    PREFIX,
    backend_of,
    compiler_errors_as_failures,
    counting_backend,
    require_one_graph,
    rows_may_differ,
)
from ..mixer.trial import Trial

TRAINING = Draw(tokens=(5, 5), batch_size=(2, 2), starts=("none",), uses=("training",), chunk_size=4)


@check(
    compilable,
    use="training with torch.compile",
    remedy=NOT_COMPILED,
    share=0,
    draw=TRAINING,
    compiles=True,
)
def training_compiles_into_one_graph(trial: Trial) -> None:
    """Training in the default paradigm compiles with `fullgraph=True`, forward and backward. It gives the results of
    eager mode, and does not recompile for other data of the same shapes."""
    require_one_graph(trial, trial.used())


@check(
    stateful,
    compilable,
    recurrent,
    use="decoding with torch.compile: it compiles at every token",
    remedy=NOT_COMPILED,
    share=0,
    draw=Draw(tokens=(6, 6), batch_size=(2, 2), starts=("none",)),
    compiles=True,
)
def decoding_compiles_once(trial: Trial) -> None:
    """A decoding step compiles with `fullgraph=True` and once for all tokens. Steps give the same as the whole segment,
    also for rows that have processed different numbers of tokens. A growing state that ignores `max_length` may need
    more graphs, because its shapes change with every token."""
    torch._dynamo.reset()
    counter = counting_backend(backend_of(trial))
    step = torch.compile(trial.mixer.step, fullgraph=True, backend=counter)
    x = trial.tokens()
    with compiler_errors_as_failures(), torch._dynamo.config.patch(recompile_limit=2 * x.shape[1]):
        state, expected = _prefilled(trial, x)
        shapes = _shapes(state)
        y, after = trial.decode(x, state, step)
    trial.compare("compiled steps against the whole", (y, None), (expected, None))
    count = f"expected {x.shape[1]} steps to compile 1 graph, got {counter.frame_count}"
    once = counter.frame_count == 1 or (trial.mixer.traits.state == "growing" and _shapes(after) != shapes)
    require(once, f"{count}: something that changes with every token is not a tensor")


def _prefilled(trial: Trial, x: Tensor) -> tuple[Any, Tensor]:
    """Return a state with room for the tokens x, and the expected outputs of x.

    The first row has processed no tokens, and every further row more, if the mixer allows rows of different lengths.
    """
    room = x.shape[1] + PREFIX * len(x)
    with torch.no_grad():  # a learned initial state has an autograd graph, which decoding must not have
        state, states = trial.mixer.init_state(len(x), max_length=x.shape[1]), []
        for row in range(len(x) if rows_may_differ(trial) else 0):
            initial = trial.mixer.init_state(1, max_length=room)
            states.append(trial.mix(trial.tokens(1, PREFIX * row), initial)[1] if row else initial)
        try:
            state = concatenate(states) if states else state
        except SeqmixError:  # the caches ignore `max_length`, so their shapes differ
            states = []
    if not states:
        return state, trial.mix(x, None)[0]
    return state, torch.cat([trial.mix(x[row : row + 1], before)[0] for row, before in enumerate(states)])


def _shapes(state: Any) -> list[torch.Size]:
    return [leaf.shape for leaf in to_dict(state).values()]
