"""Low precision, autocast and extremes."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...mixers.state import to_dict
from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError
from ..check import LESS_PRECISE, check, packing, shifted_leaves
from ..compare import FEW, require, require_near
from ..mixer.case import LENGTHS, USES, Draw
from ..mixer.rounding import LOW, is_copied, require_near_float64, rows_moved, step_by_step, tolerance_after, widened
from ..mixer.trial import Trial, named_leaves, named_results

LONG = 700
"""Tokens of a long segment: more than a few blocks, and than an integer of 8 bits counts."""


MANY = 24
"""Tokens after which the numbers of a sum have as many bits as a float32 has."""


@check(
    use="training and evaluation in low precision",
    remedy=LESS_PRECISE,
    share=0.08,
    draw=Draw(pieces=(2, 3), tokens=(8, 16), fixed=30, batch_size=(2, 2), starts=("none", "read"), dtypes=LOW),
)
def low_precision_is_near_float64(trial: Trial) -> None:
    """In float32, bfloat16 and float16, output, final state and gradients are finite and near float64 on the same
    rounded numbers, with a state carried along."""
    x, state, exact = trial.tokens(), trial.state(), trial.rebuilt(torch.float64)
    calls = {f"{p} in {trial.case.dtype}": trial.call(p) for p in trial.paradigms}
    whole, rounded = trial.call(trial.reference, exact), None
    if trial.mixer.traits.has_state:
        calls = {what: trial.in_pieces(call) for what, call in calls.items()}
        rounded = step_by_step(trial, exact)
    require_near_float64(trial, calls, whole, x, state, exact, rounded=rounded)


@check(
    packing,
    use="packed training in low precision",
    remedy=LESS_PRECISE,
    share=0.06,
    draw=Draw(pieces=(2, 4), tokens=(0, 16), many=8, lists=((0, 70, 9, 0),), batch_size=(1, 1), uses=USES, dtypes=LOW),
)
def packing_keeps_precision(trial: Trial) -> None:
    """In float32, bfloat16 and float16, packed documents are as near float64 as sequences: output, final state and
    gradients, in every way of training."""
    x, state, exact = trial.tokens(), trial.state(len(trial.case.lengths)), trial.rebuilt(torch.float64)
    boundaries = trial.boundaries()
    calls = {
        f"{p}, {trial.use}, packed documents in {trial.case.dtype}": trial.kept(trial.used(p, cu_seqlens=boundaries))
        for p in trial.paradigms
    }
    whole = trial.kept(trial.call(trial.reference, exact, cu_seqlens=boundaries))  # in float64 they are sequences
    require_near_float64(trial, calls, whole, x, state, exact)


LENGTHY = Draw(
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
    share=0.02,
    long=True,
    draw=LENGTHY,
)
def long_segments_do_not_drift(trial: Trial) -> None:
    """At the end of hundreds of tokens low precision is as near float64 as at the start, in every paradigm, with
    extreme gates and decays too."""
    length = trial.case.length
    while True:
        try:
            return _does_not_drift(trial, length)
        except SeqmixError:  # a table of positions may end
            if length <= LENGTHS[-1]:
                raise
            length //= 2


def _does_not_drift(trial: Trial, length: int) -> None:
    exact, dtype = trial.rebuilt(torch.float64), trial.case.dtype
    tolerance, last = tolerance_after(length, trial), length // 8
    x, state = trial.tokens(length=length), trial.state()
    x = x / trial.case.scale if dtype == torch.float16 else x  # whose largest number is 65,504

    def ends(y: Tensor, after: Any) -> dict[str, Tensor]:
        return named_results(y[:, -last:], after)

    expected = ends(*trial.mix(x.double(), widened(state), exact))
    nearby = x.double() * (1 + torch.finfo(dtype).eps / 2 * trial.like(x).double())
    shifted = cache(lambda: ends(*trial.mix(nearby, widened(state), exact)))
    if trial.mixer.traits.has_state:
        start = state or exact.init_state(1, max_length=length)
        stepped = torch.no_grad()(step_by_step(trial, exact))
        moved = rows_moved(lambda x, state, rounds: ends(*stepped(x, state, rounds)), x, start, dtype)
    else:
        moved = rows_moved(lambda x, *_: ends(*trial.mix(x, None, exact)), x, None, dtype)
    for paradigm in trial.paradigms:
        again = state is None and trial.mixer.traits.takes_state(paradigm)
        # quadratic: of the default, from a state is enough, and of others hundreds of tokens
        spare = again or paradigm is not trial.mixer.paradigm
        if paradigm is Paradigm.PARALLEL and length > LONG and spare:
            continue
        actual = ends(*trial.mix(x, state, paradigm=paradigm))
        what = f"{paradigm} in {dtype}, the last {last} of {length} tokens"
        for name, result in expected.items():
            ends_here = lambda name=name: shifted()[name]  # noqa: E731
            require_near(name, what, actual[name], result, tolerance, row_moves=moved, perturbed=ends_here)


@check(
    use="decoding in low precision: a state is rounded at every token",
    share=0.06,
    draw=Draw(tokens=(1, 6), dtypes=(torch.float64, *LOW)),
)
def dtypes_are_kept(trial: Trial) -> None:
    """Output has the input's dtype, and a state's leaves those of init_state: float32 at least, and not rounded to
    less, but for leaves whose numbers are only copied once they are there (a cache), which may have the parameters'."""
    mixer, x, state = trial.mixer, trial.tokens(), trial.state()
    initial = to_dict(trial.initial_state(trial.case.batch_size))
    for name, leaf in initial.items():
        if shifted_leaves(mixer).get(name):
            require(leaf.dtype == torch.int64, f"init_state: {name} is {leaf.dtype}; positions are int64")
        elif leaf.is_floating_point():
            allowed = (torch.promote_types(leaf.dtype, mixer.state_dtype), mixer.dtype)
            require(
                leaf.dtype in allowed,
                f"init_state: {name} is {leaf.dtype}; floats are {' or '.join(map(str, allowed))}",
            )
    floats = {name: leaf for name, leaf in initial.items() if leaf.is_floating_point()}
    narrow = [name for name, leaf in floats.items() if leaf.itemsize < mixer.state_dtype.itemsize]
    for name in narrow:
        sentence = f"the state's {name} is {initial[name].dtype}, and is computed from what it was before a token"
        require(is_copied(trial, name), f"{sentence}, so it is at least {mixer.state_dtype}")
    for paradigm in trial.paradigms:
        y, after = trial.mix(x, state, paradigm=paradigm)
        require(y.dtype == x.dtype, f"{paradigm}: the output is {y.dtype}, and the input is {x.dtype}")
        require(y.shape == x.shape, f"{paradigm}: the output is {list(y.shape)}, and the input is {list(x.shape)}")
        for name, leaf in to_dict(after).items():
            wanted = initial[name].dtype
            require(leaf.dtype == wanted, f"{paradigm}: the state's {name} is {leaf.dtype}, and init_state's {wanted}")
        # what has 16 bits is short after a few tokens, and what is added to a number of 24 bits is not
        many, takes_state = trial.tokens(length=MANY), mixer.traits.takes_state(paradigm)
        fine = trial.state(start="moved") if takes_state else None
        _, after = trial.mix(many, fine, paradigm=paradigm)
        # one token has code of its own
        _, stepped = trial.mix(many[:, :1], after, paradigm=paradigm) if takes_state else (None, after)
        leaves = [*to_dict(after).items(), *to_dict(stepped).items()]
        for name, leaf in leaves:
            if leaf.dtype == torch.float32 and _is_coarse(leaf):
                _, exact = trial.mix(many.double(), widened(fine), trial.rebuilt(torch.float64))
                rounded = not _is_coarse(to_dict(exact)[name].float()) and not is_copied(trial, name)
                sentence = f"{paradigm}: the state's {name} is float32, and all its numbers fit in 16 bits"
                require(not rounded, f"{sentence}: they were rounded")


def _is_coarse(leaf: Tensor) -> bool:
    """True if the float32 numbers have the 10 bits of float16 or TF32, or the 7 of bfloat16; of a few, no telling."""
    numbers = leaf[(leaf != 0) & leaf.isfinite()]
    return numbers.numel() >= FEW and not (numbers.view(torch.int32) & 0x1FFF).any()


@check(
    use="training: extreme inputs give NaN or inf",
    share=0.06,
    draw=Draw(tokens=(1, 40), fixed=130, long=4, batch_size=(1, 1), dtypes=LOW),
)
def extremes_are_finite(trial: Trial) -> None:
    """Long segments and long runs of zeros, in 16 bits too, and inputs of a thousand (so extreme gates and decays), but
    in float16, give finite results and gradients."""
    x, half = trial.tokens(), trial.case.length // 2
    inputs = {
        "normal inputs": x,
        "zeros": torch.zeros_like(x),
        "zeros before the second half": torch.cat((torch.zeros_like(x[:, :half]), x[:, half:]), dim=1),
        "zeros after the first half": torch.cat((x[:, :half], torch.zeros_like(x[:, half:])), dim=1),
    }
    if trial.case.dtype != torch.float16:  # whose largest number is 65,504
        inputs["inputs of a thousand"] = 1000 * x
    x, state = torch.cat(list(inputs.values())), trial.state(len(inputs))
    exact = cache(lambda: _named(*trial.differentiate(trial.call(trial.reference, wide), x.double(), widened(state))))
    wide = trial.rebuilt(torch.float64)
    for paradigm in trial.paradigms:
        results = _named(*trial.differentiate(trial.call(paradigm), x, state))
        of_parameters = {f"the gradient of {name}" for name, _ in trial.mixer.named_parameters()}
        for name, tensor in results.items():
            whole = name in of_parameters
            for what, part in [(", ".join(inputs), tensor)] if whole else zip(inputs, tensor, strict=True):
                if part.isfinite().all() or ("thousand" in what and _may_overflow(name, exact()[name], part.dtype)):
                    continue
                require(False, f"{paradigm} in {trial.case.dtype}, {what}: {name} is not finite")


def _named(results: dict[str, Tensor], after: Any) -> dict[str, Tensor]:
    return results | named_leaves("the final state's", after)


def _may_overflow(name: str, exact: Tensor, dtype: torch.dtype) -> bool:
    """True of a gradient whose exact value is above the root of the dtype's largest number: the derivative of a
    quotient squares its denominator."""
    return "gradient" in name and bool(exact.abs().max() > torch.finfo(dtype).max ** 0.5)
