"""Checks of batches: rows are independent sequences, and the strides of tensors do not matter."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...mixers.base.state import is_inexact, map_state, select
from ..check import check
from ..gradients import strided, time_first, with_gradient_layout
from ..mixer.case import CROWDS, Draw
from ..mixer.trial import Trial

FEW = 4
"""Number of rows of a large batch that are processed together, without the others; in a small one, one at a time."""

SAMPLES = 2
"""Number of sequences that continue from the state of a single row."""

AMPLIFIED = 30.0
"""Factor that enlarges the tokens of one row: if anything is normalised over rows, the other rows vanish."""


@check(
    use="any batch: a sequence's result depends on its neighbours",
    share=0.09,
    draw=Draw(tokens=(1, 8), batch_size=(2, 3), crowded=4),
)
def rows_are_independent(trial: Trial) -> None:
    """A sequence gives the same result alone and in any batch, small or large, with and without a final state, even if
    the tokens of other rows are much larger."""
    rows = trial.case.batch_size
    x, state = trial.tokens(rows), trial.state(rows)
    x[0] *= AMPLIFIED if trial.case.seed % 2 else 1
    has_state, crowded = trial.mixer.traits.has_state, rows >= CROWDS[0]
    groups = trial.index(*range(rows)).split(1 if rows < CROWDS[0] else FEW)
    if crowded:  # without a final state, the last rows of a large batch are enough
        calls = [(has_state, groups), (False, groups[-1:])]
    else:
        calls = [(has_state and trial.case.seed // 2 % 2 == 1, groups)]
    for paradigm, (return_state, chosen) in itertools.product(trial.paradigms, calls):
        y, states = trial.mix(x, state, paradigm=paradigm, return_state=return_state)
        for group in chosen:
            before = None if state is None else select(state, group)
            alone = trial.mix(x[group], before, paradigm=paradigm, return_state=return_state)
            what = f"{paradigm}, rows {group.tolist()} of {len(x)} against the same rows without the others"
            trial.compare(what, (y[group], None if states is None else select(states, group)), alone)


@check(
    use="any call with slices or transposed tensors, as from a fused projection: wrong numbers are read",
    share=0.06,
    draw=Draw(tokens=(1, 8), batch_size=(1, 3)),
)
def strides_change_nothing(trial: Trial) -> None:
    """Results do not depend on memory layout, with and without gradients. Inputs, states and upstream gradients may be
    non-contiguous, or may begin within a larger tensor, as rows split from a batch do. Rows of a state may share the
    memory of one row, as in a prompt's state expanded over samples."""
    x, state = trial.tokens(), trial.state()
    # other libraries use time-first tensors
    layout = time_first if trial.case.seed % 3 == 0 else strided
    for paradigm in trial.paradigms:
        call = trial.call(paradigm)

        def with_strides(x, state, call=call):
            y, after = call(layout(x), _map_leaves(strided, state))
            after = _map_leaves(lambda leaf: with_gradient_layout(leaf, strided) if is_inexact(leaf) else leaf, after)
            return with_gradient_layout(y, layout), after

        expected = trial.differentiate(call, x, state)
        actual = trial.differentiate(with_strides, x, state)
        trial.compare(f"{paradigm}, strided inputs against contiguous ones", actual, expected)
        if trial.case.seed % 3 == 1:

            def with_last_rows(x, state, call=call):
                return call(_last_rows(x), _map_leaves(_last_rows, state))

            inner = trial.differentiate(with_last_rows, x, state)
            what = f"{paradigm}, inputs that are the last rows of larger tensors against separate ones"
            trial.compare(what, inner, expected)
        # without gradients: the whole segment, and one token as in decoding
        for length in {x.shape[1], 1 if trial.mixer.traits.has_state else x.shape[1]}:
            whole = expected[0]["the output"][:, :length], expected[1] if length == x.shape[1] else None
            for rows, embed in {"the last": _last_rows, "every other": _every_other_row}.items():
                with torch.no_grad():
                    y, after = call(embed(x[:, :length]), _map_leaves(embed, state))
                what = f"{paradigm}, without gradients, {length} tokens, inputs that are {rows} rows of larger tensors"
                trial.compare(what, (y, after if length == x.shape[1] else None), whole)
    if trial.mixer.traits.has_state:
        _require_samples_may_share_a_prompt(trial, x[:1])


def _require_samples_may_share_a_prompt(trial: Trial, prompt: Tensor) -> None:
    """Compare steps from a prompt's state expanded over rows with steps from copies of that row."""
    samples = trial.tokens(SAMPLES, prompt.shape[1])

    def state() -> Any:  # with room for the sampled tokens
        with torch.no_grad():
            return trial.call()(prompt, trial.mixer.init_state(1, max_length=2 * prompt.shape[1]))[1]

    def expanded(leaf: Tensor) -> Tensor:
        return leaf.expand(SAMPLES, *leaf.shape[1:])

    y, _ = trial.decode(samples, map_state(expanded, state()), trial.call(trial.reference))
    expected, _ = trial.decode(samples, select(state(), trial.index(*[0] * SAMPLES)), trial.call(trial.reference))
    what = "steps from a state that is expanded over rows against a state with copied rows"
    trial.compare(what, (y, None), (expected, None))


def _map_leaves(layout: Callable[[Tensor], Tensor], state: Any) -> Any:
    """Return a state whose leaves have another layout; None for None."""
    return None if state is None else map_state(layout, state)


def _last_rows(x: Tensor) -> Tensor:
    """Return the same numbers, contiguous, as the last rows of a larger tensor."""
    return torch.cat((torch.ones_like(x), x))[len(x) :]


def _every_other_row(x: Tensor) -> Tensor:
    """Return the same numbers as every other row of a larger tensor."""
    return torch.stack((x, torch.ones_like(x)), dim=1).flatten(0, 1)[::2]
