"""Checks of low precision and of extreme inputs."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...mixers.base.state import to_dict
from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError
from ..check import LESS_PRECISE, check, packing, shifted_leaves
from ..compare import FEW, require, require_near
from ..mixer.case import LENGTHS, USES, Draw
from ..mixer.rounding import LOW, is_copied, require_near_float64, rows_moved, step_by_step, tolerance_after, widened
from ..mixer.trial import Trial, named_leaves, named_results

LONG = 700
"""Number of tokens of a long segment: more than a few blocks, and more than an 8-bit integer can count."""


MANY = 24
"""Number of tokens after which the sums in a float32 state use all of its bits."""


@check(
    use="training and evaluation in low precision: results are wrong or not finite",
    remedy=LESS_PRECISE,
    share=0.05,
    draw=Draw(pieces=(2, 3), tokens=(8, 16), fixed=30, batch_size=(2, 2), starts=("none", "read"), dtypes=LOW),
)
def low_precision_is_near_float64(trial: Trial) -> None:
    """In float32, bfloat16 and float16, output, final state and gradients are finite and near those of float64 on the
    same rounded numbers, also if the segment is processed in pieces."""
    x, state, exact = trial.tokens(), trial.state(), trial.rebuilt(torch.float64)
    calls = {f"{p} in {trial.case.dtype}": trial.call(p) for p in trial.paradigms}
    whole, rounded = trial.call(trial.reference, exact), None
    if trial.mixer.traits.has_state:
        calls = {what: trial.in_pieces(call) for what, call in calls.items()}
        rounded = step_by_step(trial, exact)
    require_near_float64(trial, calls, whole, x, state, exact, rounded=rounded)


@check(
    packing,
    use="packed training in low precision: results are less exact than without packing",
    remedy=LESS_PRECISE,
    share=0.04,
    draw=Draw(pieces=(2, 4), tokens=(0, 16), many=8, lists=((0, 70, 9, 0),), batch_size=(1, 1), uses=USES, dtypes=LOW),
)
def packing_keeps_precision(trial: Trial) -> None:
    """In float32, bfloat16 and float16, output, final state and gradients of packed documents are as near float64 as
    those of sequences, in every way of training."""
    x, state, exact = trial.tokens(), trial.state(len(trial.case.lengths)), trial.rebuilt(torch.float64)
    boundaries = trial.boundaries()
    calls = {
        f"{p}, {trial.use}, packed documents in {trial.case.dtype}": trial.without_growing_state(
            trial.used(p, cu_seqlens=boundaries)
        )
        for p in trial.paradigms
    }
    # another check makes sure that packed documents equal sequences in float64
    whole = trial.without_growing_state(trial.call(trial.reference, exact, cu_seqlens=boundaries))
    require_near_float64(trial, calls, whole, x, state, exact)


LONG_SEGMENT = Draw(
    lists=((2049,),),
    tokens=(LONG - 99, LONG),
    batch_size=(1, 1),
    starts=("none", "initial"),
    scales=(1.0, 20.0),
    dtypes=LOW,
)


@check(
    use="long sequences in low precision: errors add up",
    remedy=LESS_PRECISE,
    share=0.01,
    long=True,
    draw=LONG_SEGMENT,
)
def long_segments_do_not_drift(trial: Trial) -> None:
    """At the end of hundreds or thousands of tokens, low precision is still near float64, in every paradigm, also with
    extreme gates and decays: in 16 bits within the same tolerance as at the start, in float32 within one rounding per
    token."""
    length = trial.case.length
    while True:
        try:
            return _require_no_drift(trial, length)
        except SeqmixError:  # the mixer may have a table of fewer positions
            if length <= LENGTHS[-1]:
                raise
            length //= 2


def _require_no_drift(trial: Trial, length: int) -> None:
    """Fail unless the last eighth of a segment, and the final state, are near the exact ones."""
    exact, dtype = trial.rebuilt(torch.float64), trial.case.dtype
    tolerance, last = tolerance_after(length, trial), length // 8
    x, state = trial.tokens(length=length), trial.state()
    x = x / trial.case.scale if dtype == torch.float16 else x  # large tokens overflow float16 (65,504)

    def ends(y: Tensor, after: Any) -> dict[str, Tensor]:
        return named_results(y[:, -last:], after)

    expected = ends(*trial.mix(x.double(), widened(state), exact))
    nearby = x.double() * (1 + torch.finfo(dtype).eps / 2 * trial.like(x).double())
    perturbed = cache(lambda: ends(*trial.mix(nearby, widened(state), exact)))
    if trial.mixer.traits.has_state:
        start = state or exact.init_state(1, max_length=length)
        stepped = torch.no_grad()(step_by_step(trial, exact))
        row_moves = rows_moved(lambda x, state, rounds_states: ends(*stepped(x, state, rounds_states)), x, start, dtype)
    else:
        row_moves = rows_moved(lambda x, *_: ends(*trial.mix(x, None, exact)), x, None, dtype)
    for paradigm in trial.paradigms:
        # parallel takes quadratic time: thousands of tokens only if it is the default, and from a state if it takes one
        has_case_with_state = state is None and trial.mixer.traits.takes_state(paradigm)
        expendable = has_case_with_state or paradigm is not trial.mixer.paradigm
        if paradigm is Paradigm.PARALLEL and length > LONG and expendable:
            continue
        actual = ends(*trial.mix(x, state, paradigm=paradigm))
        what = f"{paradigm} in {dtype}, the last {last} of {length} tokens"
        for name, result in expected.items():
            perturbed_result = lambda name=name: perturbed()[name]  # noqa: E731
            require_near(name, what, actual[name], result, tolerance, row_moves=row_moves, perturbed=perturbed_result)


@check(
    use="decoding in low precision: the state is rounded at every token",
    share=0.04,
    draw=Draw(tokens=(1, 6), dtypes=(torch.float64, *LOW)),
)
def dtypes_are_kept(trial: Trial) -> None:
    """The output has the dtype of the input, and each leaf of a state the dtype that it has in `init_state`: at least
    float32, and not rounded to 16 bits in between. Leaves whose numbers are only copied (a cache) may have the dtype of
    the parameters."""
    mixer, x, state = trial.mixer, trial.tokens(), trial.state()
    initial = to_dict(trial.initial_state(trial.case.batch_size))
    for name, leaf in initial.items():
        if shifted_leaves(mixer).get(name):
            require(leaf.dtype == torch.int64, f"init_state: expected {name}, a position, in int64, got {leaf.dtype}")
        elif leaf.is_floating_point():
            allowed = (torch.promote_types(leaf.dtype, mixer.state_dtype), mixer.dtype)
            dtypes = " or ".join(map(str, allowed))
            require(leaf.dtype in allowed, f"init_state: expected {name} in {dtypes}, got {leaf.dtype}")
    floats = {name: leaf for name, leaf in initial.items() if leaf.is_floating_point()}
    narrow = [name for name, leaf in floats.items() if leaf.itemsize < mixer.state_dtype.itemsize]
    for name in narrow:
        sentence = f"expected the state's {name} in at least {mixer.state_dtype}, got {initial[name].dtype}"
        require(is_copied(trial, name), f"{sentence}: each token computes it from its earlier value")
    for paradigm in trial.paradigms:
        y, after = trial.mix(x, state, paradigm=paradigm)
        require(y.dtype == x.dtype, f"{paradigm}: expected an output in {x.dtype}, like the input, got {y.dtype}")
        shapes = f"expected an output of shape {list(x.shape)}, like the input, got {list(y.shape)}"
        require(y.shape == x.shape, f"{paradigm}: {shapes}")
        for name, leaf in to_dict(after).items():
            expected = initial[name].dtype
            dtypes = f"expected the state's {name} in {expected}, as in init_state, got {leaf.dtype}"
            require(leaf.dtype == expected, f"{paradigm}: {dtypes}")
        # a leaf that is rounded to 16 bits shows after a few tokens: sums in float32 use 24 bits by then
        many, takes_state = trial.tokens(length=MANY), mixer.traits.takes_state(paradigm)
        before = trial.state(start="moved") if takes_state else None
        _, after = trial.mix(many, before, paradigm=paradigm)
        # a single token may have its own code path
        _, stepped = trial.mix(many[:, :1], after, paradigm=paradigm) if takes_state else (None, after)
        leaves = [*to_dict(after).items(), *to_dict(stepped).items()]
        for name, leaf in leaves:
            if leaf.dtype == torch.float32 and _is_coarse(leaf):
                _, exact = trial.mix(many.double(), widened(before), trial.rebuilt(torch.float64))
                rounded = not _is_coarse(to_dict(exact)[name].float()) and not is_copied(trial, name)
                sentence = f"{paradigm}: the state's {name} is float32, but all its numbers fit in 16 bits"
                require(not rounded, f"{sentence}: they were rounded")


def _is_coarse(leaf: Tensor) -> bool:
    """Return True if at least `FEW` float32 numbers all fit the 10 mantissa bits of float16 or TF32."""
    numbers = leaf[(leaf != 0) & leaf.isfinite()]
    return numbers.numel() >= FEW and not (numbers.view(torch.int32) & 0x1FFF).any()


@check(
    use="training: extreme inputs give NaN or infinity",
    share=0.04,
    draw=Draw(tokens=(1, 40), fixed=130, long=4, batch_size=(1, 1), dtypes=LOW),
)
def extremes_are_finite(trial: Trial) -> None:
    """Results and gradients are finite for long segments and long runs of zeros, also in 16 bits. Except in float16,
    they are finite for inputs around 1,000 too, which make gates and decays extreme."""
    x, half = trial.tokens(), trial.case.length // 2
    inputs = {
        "normal inputs": x,
        "zeros": torch.zeros_like(x),
        "zeros before the second half": torch.cat((torch.zeros_like(x[:, :half]), x[:, half:]), dim=1),
        "zeros after the first half": torch.cat((x[:, :half], torch.zeros_like(x[:, half:])), dim=1),
    }
    if trial.case.dtype != torch.float16:  # products overflow float16 (65,504)
        inputs["inputs of a thousand"] = 1000 * x
    x, state = torch.cat(list(inputs.values())), trial.state(len(inputs))
    exact = trial.rebuilt(torch.float64)
    call = trial.call(trial.reference, exact)
    exact_results = cache(lambda: _named(*trial.differentiate(call, x.double(), widened(state))))
    for paradigm in trial.paradigms:
        results = _named(*trial.differentiate(trial.call(paradigm), x, state))
        of_parameters = {f"the gradient of {name}" for name, _ in trial.mixer.named_parameters()}
        for name, tensor in results.items():
            whole = name in of_parameters
            for what, part in [(", ".join(inputs), tensor)] if whole else zip(inputs, tensor, strict=True):
                if part.isfinite().all() or (
                    "thousand" in what and _may_overflow(name, exact_results()[name], part.dtype)
                ):
                    continue
                require(False, f"{paradigm} in {trial.case.dtype}, {what}: {name} is not finite")


def _named(results: dict[str, Tensor], after: Any) -> dict[str, Tensor]:
    return results | named_leaves("the final state's", after)


def _may_overflow(name: str, exact: Tensor, dtype: torch.dtype) -> bool:
    """Return True for a gradient whose exact value exceeds the square root of the dtype's largest number.

    It may overflow on the way, because the derivative of a quotient squares the denominator.
    """
    return "gradient" in name and bool(exact.abs().max() > torch.finfo(dtype).max ** 0.5)
