"""Comparison of low-precision results with float64; results that are sensitive to rounded inputs may differ more."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ...mixers.base.contract import SequenceMixer
from ...mixers.base.state import from_dict, is_inexact, map_state, to_dict
from ..compare import GRADIENTS, require_near
from .trial import SegmentCall, Trial, named_results

LOW = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that are compared with float64."""

Rounded = Callable[..., tuple[Tensor, Any]]
"""Function of a segment, a state, and `rounds_states` (True to round intermediate states).

It returns output and final state."""


PERTURBATIONS = (1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4, 8, 8, 16, 16)
"""Sizes of the random perturbations that find ill-conditioned rows, as multiples of the machine epsilon.
The large ones find a nearby discontinuity."""


JUMP = 3
"""A row that moves more than this many times as far as smaller perturbations predict has crossed a discontinuity."""


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
    """Compare output, final state and gradients of low-precision calls with those of one exact call.

    Args:
        trial: the case.
        calls: calls in low precision, by their description.
        whole: the float64 call whose results they should equal.
        x: tokens, in low precision.
        state: state before the tokens, in low precision.
        exact: the float64 mixer, whose parameters `whole` reads.
        dtype: dtype whose tolerance applies; the case's by default.
        rounded: `whole` with optional rounding of intermediate states; by default `whole` itself.

    Raises:
        CheckFailure: a result of a call is not near the exact one.
    """
    dtype = trial.case.dtype if dtype is None else dtype
    tolerance = trial.subject.tolerances[dtype]
    expected, exact_after = trial.differentiate(whole, x.double(), widened(state), mixer=exact)
    results = named_results(expected.pop("the output"), exact_after)
    numbers = torch.cat([x.new_zeros(1), *(gradient.flatten() for gradient in expected.values())])
    # an exact gradient may be zero up to rounding, such as that of a key bias under a softmax
    floor = 0.1 * numbers.square().mean().sqrt().item()

    def exact_results(x: Tensor, state: Any, rounds_states: bool) -> dict[str, Tensor]:
        call = whole if rounded is None else partial(rounded, rounds_states=rounds_states)
        tensors, after = trial.differentiate(call, x, state, mixer=exact, zeros=results)
        return named_results(tensors.pop("the output"), after) | tensors

    row_moves = rows_moved(exact_results, x, state, dtype)
    for what, call in calls.items():
        tensors, after = trial.differentiate(call, x, state, zeros=results, used=True)
        for name, result in named_results(tensors.pop("the output"), after).items():
            require_near(name, what, result, results[name], tolerance, row_moves=row_moves)
        for name, gradient in tensors.items():
            require_near(name, what, gradient, expected[name], GRADIENTS * tolerance, floor=floor, row_moves=row_moves)


def tolerance_after(length: int, trial: Trial) -> float:
    """Return the tolerance of the case's dtype after a number of tokens.

    A float32 state is rounded once per token, and all roundings may go the same way: after T tokens they add up to T
    units of roundoff, 2^-24 T. The tolerance of float32 equals 32 such roundings, so it grows from token 32 on. In 16
    bits it stays the same: states are float32 there too, and the roundings of 16-bit operands do not add up.
    """
    dtype = trial.case.dtype
    return trial.subject.tolerances[dtype] * (max(1, length / 32) if dtype == torch.float32 else 1)


def step_by_step(trial: Trial, exact: SequenceMixer) -> Rounded:
    """Return the exact map, token by token, with optional perturbation of the state by float32 rounding."""
    step, perturb = trial.call(trial.reference, exact), rounding(torch.float32)

    def stepped(x: Tensor, state: Any, rounds_states: bool) -> tuple[Tensor, Any]:
        outputs = []
        for token in x.split(1, dim=1):
            y, state = step(token, perturb(state) if rounds_states else state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    return stepped


def widened(state):
    """Return a state with the dtypes that the float64 mixer's states have."""
    if state is None:
        return None
    return map_state(lambda x: x.to(torch.promote_types(x.dtype, torch.float64)) if is_inexact(x) else x, state)


def rounding(dtype: torch.dtype, seed: int = 0, times: int = 1) -> Callable[[Any], Any]:
    """Return a function that perturbs a float64 tensor or state at random.

    Args:
        dtype: dtype whose machine epsilon is the unit of the perturbation.
        seed: seed of the perturbation.
        times: largest relative change of a number, as a multiple of the machine epsilon.
    """
    generator, unit = torch.Generator().manual_seed(seed), times * torch.finfo(dtype).eps

    def perturbed(leaf: Tensor) -> Tensor:
        noise = 2 * torch.rand(leaf.shape, generator=generator, dtype=torch.float64) - 1
        return leaf * (1 + unit * noise.to(leaf.device)) if is_inexact(leaf) else leaf.clone()

    return lambda state: None if state is None else map_state(perturbed, state)


def rows_moved(
    exact: Callable[[Tensor, Any, bool], Mapping[str, Tensor]], x: Tensor, state: Any, dtype: torch.dtype
) -> Callable[[str], Tensor]:
    """Return a function that gives the largest change of each exact row if inputs and intermediate states are rounded.

    A row that changes much is ill-conditioned: an input is near a discontinuity, or almost everything cancels. No
    low-precision mixer can be near the exact result there.

    Args:
        exact: returns the exact results by name, for tokens, a state, and True to round intermediate states.
        x: tokens.
        state: state before the tokens.
        dtype: dtype that the tokens are rounded to; states are rounded to float32.

    Returns:
        A function from the name of a result to the norm of each row's change. The first call computes them all.
    """

    @cache
    def distances() -> dict[str, Tensor]:
        # compare with the same call: the result of another paradigm may differ by more than roundings
        results = exact(x.double(), widened(state), False)
        farthest = {name: torch.zeros_like(result.norm(dim=-1)) for name, result in results.items()}
        for seed, times in enumerate(PERTURBATIONS):
            perturb_tokens, perturb_state = rounding(dtype, seed, times), rounding(torch.float32, seed, times)
            perturbed = exact(perturb_tokens(x.double()), perturb_state(widened(state)), True)
            for name, before in farthest.items():
                distance = (perturbed[name] - results[name]).norm(dim=-1)
                if times > 1:  # a smooth row moves in proportion, so divide; a jump counts in full
                    distance = torch.where(distance > JUMP * times * before, distance, distance / times)
                farthest[name] = torch.maximum(before, distance)
        return farthest

    return lambda name: distances()[name]


def is_copied(trial: Trial, leaf: str) -> bool:
    """Return True if a token only copies the numbers of a leaf, as in a cache or a running maximum.

    Copied numbers keep their rounding error, whereas in a sum errors add up. The test: two states that differ in this
    leaf alone process the same token. Each number of the leaf that then differs has to be one that it held before, in
    either state.
    """
    exact = trial.rebuilt(torch.float64)  # in float64, two numbers are not equal by accident of rounding
    _, before = trial.mix(trial.tokens(2, 4).double(), None, exact)
    leaves = to_dict(before)
    others = leaves[leaf] * trial.like(leaves[leaf]).exp()
    changed, token = from_dict(before, leaves | {leaf: others}), trial.tokens(2, 1).double()
    after, after_changed = (to_dict(trial.mix(token, state, exact)[1])[leaf] for state in (before, changed))
    copied = torch.isin(after, leaves[leaf]) | torch.isin(after_changed, others)
    return bool(copied[after != after_changed].all())
