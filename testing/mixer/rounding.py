"""How near to float64 a result in low precision is, and how near it can be."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ...mixers.contract import SequenceMixer
from ...mixers.state import from_dict, is_inexact, map_state, to_dict
from ..compare import GRADIENTS, near
from .trial import SegmentCall, Trial, named_results

LOW = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that are compared with float64."""

Rounded = Callable[..., tuple[Tensor, Any]]
"""Output and final state of a segment, a state, and `rounds`: whether there are roundings on the way."""


DRAWS = (1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4, 8, 8, 16, 16)
"""Roundings that move what may be ill-conditioned, as multiples of two: larger ones find a threshold that is near."""


JUMP = 3
"""How many times further than what is smooth a row moves that crosses a threshold."""


def require_near_float64(
    trial: Trial,
    calls: Mapping[str, SegmentCall],
    whole: SegmentCall,
    x: Tensor,
    state: Any,
    exact: SequenceMixer,
    dtype: torch.dtype | None = None,
    rounded: Rounded | None = None,
) -> None:
    """Compare what calls give with what the whole gives in float64, by the tolerance of a dtype: the case's by
    default. `rounded` gives the same with roundings on the way, where it is not the whole itself."""
    dtype = trial.case.dtype if dtype is None else dtype
    tolerance = trial.subject.tolerances[dtype]
    expected, exact_after = trial.differentiate(whole, x.double(), widened(state), mixer=exact)
    results = named_results(expected.pop("the output"), exact_after)
    numbers = torch.cat([x.new_zeros(1), *(gradient.flatten() for gradient in expected.values())])
    # a gradient may be zero but for rounding, as that of a key's bias under a softmax is
    floor = 0.1 * numbers.square().mean().sqrt().item()

    def named(x: Tensor, state: Any, rounds: bool) -> dict[str, Tensor]:
        call = whole if rounded is None else partial(rounded, rounds=rounds)
        tensors, after = trial.differentiate(call, x, state, mixer=exact, zeros=results)
        return named_results(tensors.pop("the output"), after) | tensors

    moved = rows_moved(named, x, state, dtype)
    for what, call in calls.items():
        tensors, after = trial.differentiate(call, x, state, zeros=results, used=True)
        for name, result in named_results(tensors.pop("the output"), after).items():
            near(name, what, result, results[name], tolerance, moved=moved)
        for name, gradient in tensors.items():
            near(name, what, gradient, expected[name], GRADIENTS * tolerance, floor=floor, moved=moved)


def tolerance_after(length: int, trial: Trial) -> float:
    """The tolerance after so many tokens.

    A state of float32 is rounded once a token, and all roundings may go one way: after T tokens they are T units of
    roundoff, 2^-24 T. What is allowed at first is as much as 32 such roundings, so it grows from 32 tokens on. States
    are float32 in 16 bits too, whose own roundings do not add up.
    """
    dtype = trial.case.dtype
    return trial.subject.tolerances[dtype] * (max(1, length / 32) if dtype == torch.float32 else 1)


def step_by_step(trial: Trial, exact: SequenceMixer) -> Rounded:
    """The exact map, of which the state is rounded to float32 after every token, if it is."""
    step, rounded = trial.call(trial.reference, exact), rounding(torch.float32)

    def stepped(x: Tensor, state: Any, rounds: bool) -> tuple[Tensor, Any]:
        outputs = []
        for token in x.split(1, dim=1):
            y, state = step(token, rounded(state) if rounds else state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    return stepped


def widened(state):
    """A state with the dtypes that the float64 mixer's states have."""
    return (
        None
        if state is None
        else map_state(lambda x: x.to(torch.promote_types(x.dtype, torch.float64)) if is_inexact(x) else x, state)
    )


def rounding(dtype: torch.dtype, seed: int = 0, times: int = 1) -> Callable[[Any], Any]:
    """What moves numbers in float64, or those of a state, at random by as much as two roundings to a dtype do, so many
    times."""
    generator, unit = torch.Generator().manual_seed(seed), times * torch.finfo(dtype).eps

    def rounded(leaf: Tensor) -> Tensor:
        noise = 2 * torch.rand(leaf.shape, generator=generator, dtype=torch.float64) - 1
        return leaf * (1 + unit * noise.to(leaf.device)) if is_inexact(leaf) else leaf.clone()

    return lambda state: None if state is None else map_state(rounded, state)


def rows_moved(
    exact: Callable[[Tensor, Any, bool], Mapping[str, Tensor]], x: Tensor, state: Any, dtype: torch.dtype
) -> Callable[[str], Tensor]:
    """How far each row of exact results moves, at most in a few draws, where what they are computed from is rounded,
    and so is what is on the way (`exact` with True). Where that crosses a threshold, or almost nothing is left of what
    cancels, no mixer is near."""

    @cache
    def rows() -> dict[str, Tensor]:
        # of the same call: another paradigm's result may differ by more than roundings
        results = exact(x.double(), widened(state), False)
        moves = {name: torch.zeros_like(result.norm(dim=-1)) for name, result in results.items()}
        for seed, times in enumerate(DRAWS):
            inputs, before = rounding(dtype, seed, times), rounding(torch.float32, seed, times)
            rounded_results = exact(inputs(x.double()), before(widened(state)), True)
            for name, far in moves.items():
                here = (rounded_results[name] - results[name]).norm(dim=-1)
                # what is smooth moves as many times further, and what jumps does not
                here = torch.where(here > JUMP * times * far, here, here / times) if times > 1 else here
                moves[name] = torch.maximum(far, here)
        return moves

    return lambda name: rows()[name]


def is_copied(trial: Trial, leaf: str) -> bool:
    """True if what a leaf holds after a token is, where it depends on what the leaf held before, one of those numbers,
    or was with others: that tells a cache, or a maximum, whose rounding stays what it was, from a sum, whose rounding
    adds up."""
    exact = trial.rebuilt(torch.float64)  # where two numbers are not equal by rounding
    _, before = trial.mix(trial.tokens(2, 4).double(), None, exact)
    leaves = to_dict(before)
    others = leaves[leaf] * trial.like(leaves[leaf]).exp()
    moved, token = from_dict(before, leaves | {leaf: others}), trial.tokens(2, 1).double()
    after, otherwise = (to_dict(trial.mix(token, state, exact)[1])[leaf] for state in (before, moved))
    copied = torch.isin(after, leaves[leaf]) | torch.isin(otherwise, others)
    return bool(copied[after != otherwise].all())
