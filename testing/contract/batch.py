"""Rows of a batch are independent sequences, and a tensor's strides do not matter."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...mixers.state import is_inexact, map_state, select
from ..check import check
from ..gradients import strided, time_first, with_gradient_layout
from ..mixer.case import CROWDS, Draw
from ..mixer.trial import Trial

FEW = 4
"""Rows of a large batch that are mixed without the others: of a small one it is each."""

SAMPLES = 2
"""Rows that go on from one row's state."""

LOUD = 30.0
"""How much larger the tokens of one row are: relative to the largest of all rows, the others are nothing."""


@check(
    use="any batch: a sequence's result depends on its neighbours",
    share=0.09,
    draw=Draw(tokens=(1, 8), batch_size=(2, 3), crowded=4),
)
def rows_are_independent(trial: Trial) -> None:
    """A sequence gives the same alone as beside others in a batch, much louder ones too, and beside few as beside many,
    with a final state and without."""
    rows = trial.case.batch_size
    x, state = trial.tokens(rows), trial.state(rows)
    x[0] *= LOUD if trial.case.seed % 2 else 1
    has_state, crowded = trial.mixer.traits.has_state, rows >= CROWDS[0]
    few = trial.index(*range(rows)).split(1 if rows < CROWDS[0] else FEW)
    # of many rows, without a state the last ones are enough
    ways = [(has_state, few), (False, few[-1:])] if crowded else [(has_state and trial.case.seed // 2 % 2 == 1, few)]
    for paradigm, (wanted, chosen) in itertools.product(trial.paradigms, ways):
        y, states = trial.mix(x, state, paradigm=paradigm, return_state=wanted)
        for some in chosen:
            alone = trial.mix(
                x[some], None if state is None else select(state, some), paradigm=paradigm, return_state=wanted
            )
            what = f"{paradigm}, rows {some.tolist()} of {len(x)} against them without the others"
            trial.compare(what, (y[some], None if states is None else select(states, some)), alone)


@check(
    use="any call with slices or transposed tensors, as of a fused projection: other numbers are read",
    share=0.06,
    draw=Draw(tokens=(1, 8), batch_size=(1, 3)),
)
def strides_change_nothing(trial: Trial) -> None:
    """Inputs, states and gradients from above that are not contiguous, or do not begin where their memory does (rows
    split from a batch), give what others give, with gradients and without; and so do rows that share the memory of one,
    as samples of a prompt whose state is expanded do."""
    x, state = trial.tokens(), trial.state()
    # time first is what other libraries have
    lay = time_first if trial.case.seed % 3 == 0 else strided
    for paradigm in trial.paradigms:
        call = trial.call(paradigm)

        def with_strides(x, state, call=call):
            y, after = call(lay(x), _laid(strided, state))
            after = _laid(lambda leaf: with_gradient_layout(leaf, strided) if is_inexact(leaf) else leaf, after)
            return with_gradient_layout(y, lay), after

        expected = trial.differentiate(call, x, state)
        actual = trial.differentiate(with_strides, x, state)
        trial.compare(f"{paradigm}, strided inputs against contiguous ones", actual, expected)
        if trial.case.seed % 3 == 1:
            inner = trial.differentiate(lambda x, state, call=call: call(_inside(x), _laid(_inside, state)), x, state)
            trial.compare(f"{paradigm}, inputs that are the last rows of larger ones against others", inner, expected)
        # without gradients, and as in decoding
        for length in {x.shape[1], 1 if trial.mixer.traits.has_state else x.shape[1]}:
            whole = expected[0]["the output"][:, :length], expected[1] if length == x.shape[1] else None
            for rows, among in {"the last": _inside, "every other": _every_other}.items():
                with torch.no_grad():
                    y, after = call(among(x[:, :length]), _laid(among, state))
                what = f"{paradigm}, without gradients, {length} tokens, inputs that are {rows} rows of larger ones"
                trial.compare(what, (y, after if length == x.shape[1] else None), whole)
    if trial.mixer.traits.has_state:
        _samples_share_a_prompt(trial, x[:1])


def _samples_share_a_prompt(trial: Trial, prompt: Tensor) -> None:
    samples = trial.tokens(SAMPLES, prompt.shape[1])

    def state() -> Any:  # with room for what is sampled
        with torch.no_grad():
            return trial.call()(prompt, trial.mixer.init_state(1, max_length=2 * prompt.shape[1]))[1]

    def expanded(leaf: Tensor) -> Tensor:
        return leaf.expand(SAMPLES, *leaf.shape[1:])

    y, _ = trial.decode(samples, map_state(expanded, state()), trial.call(trial.reference))
    expected, _ = trial.decode(samples, select(state(), trial.index(*[0] * SAMPLES)), trial.call(trial.reference))
    trial.compare(
        "steps from a state that is expanded over rows against one whose row is copied", (y, None), (expected, None)
    )


def _laid(lay: Callable[[Tensor], Tensor], state: Any) -> Any:
    return None if state is None else map_state(lay, state)


def _inside(x: Tensor) -> Tensor:
    """The same numbers, contiguous, as the last rows of what has others before them."""
    return torch.cat((torch.ones_like(x), x))[len(x) :]


def _every_other(x: Tensor) -> Tensor:
    """The same numbers, with rows of others between them."""
    return torch.stack((x, torch.ones_like(x)), dim=1).flatten(0, 1)[::2]
