"""Low precision, autocast and extremes."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from typing import Any

import torch
from hypothesis.errors import UnsatisfiedAssumption
from torch import Tensor

from ...mixers.contract import SequenceMixer
from ...mixers.state import from_dict, is_inexact, map_state, to_dict
from ...ops.paradigm import Paradigm
from ...registry import SeqmixError
from ..check import check, packing, shifted, stateful
from ..compare import FEW, GRADIENTS, near, require
from ..mixer.case import FIXED, LENGTHS, USES, Draw
from ..mixer.trial import Call, Trial, named_leaves, named_results

Rounded = Callable[..., tuple[Tensor, Any]]
"""Output and final state of a segment, a state, and `rounds`: whether there are roundings on the way."""

LOW = (torch.float32, torch.bfloat16, torch.float16)
DRAWS = (1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4, 8, 8, 16, 16)
"""Roundings that move what may be ill-conditioned, as multiples of two: larger ones find a threshold that is near."""

LONG = 700
"""Tokens of a long segment: more than a few blocks, and than an integer of 8 bits counts."""

WIDE = 300
"""Tokens of one where the mixer is wide, which costs a dozen times as much."""

LARGE_STATE = 2**17
"""Numbers of a state of which hundreds of tokens take minutes, as of features that are the squares of wide heads."""

THOUSANDS = 2048
"""Tokens of one that is computed once, wide and in float16."""

MANY = 24
"""Tokens after which the numbers of a sum have as many bits as a float32 has."""

STEPS = 160
"""Tokens decoded one by one: a state that is rounded at every token drifts."""

JUMP = 3
"""How many times further than what is smooth a row moves that crosses a threshold."""


@check(
    use="training and evaluation in low precision",
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
        rounded = _step_by_step(trial, exact)
    _near_float64(trial, calls, whole, x, state, exact, rounded=rounded)


@check(
    packing,
    use="packed training in low precision",
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
    _near_float64(trial, calls, whole, x, state, exact)


def _near_float64(
    trial: Trial,
    calls: Mapping[str, Call],
    whole: Call,
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
    expected, exact_after = trial.differentiate(whole, x.double(), _wide(state), mixer=exact)
    results = named_results(expected.pop("the output"), exact_after)
    numbers = torch.cat([x.new_zeros(1), *(gradient.flatten() for gradient in expected.values())])
    # a gradient may be zero but for rounding, as that of a key's bias under a softmax is
    floor = 0.1 * numbers.square().mean().sqrt().item()

    def named(x: Tensor, state: Any, rounds: bool) -> dict[str, Tensor]:
        call = whole if rounded is None else partial(rounded, rounds=rounds)
        found, after = trial.differentiate(call, x, state, mixer=exact, zeros=results)
        return named_results(found.pop("the output"), after) | found

    moved = _moved(named, x, state, dtype)
    for what, call in calls.items():
        found, after = trial.differentiate(call, x, state, zeros=results, used=True)
        for name, result in named_results(found.pop("the output"), after).items():
            near(name, what, result, results[name], tolerance, moved=moved)
        for name, gradient in found.items():
            near(name, what, gradient, expected[name], GRADIENTS * tolerance, floor=floor, moved=moved)


@check(
    stateful,
    use="long decoding in low precision: errors add up",
    share=0.02,
    long=True,
    draw=Draw(tokens=(STEPS, STEPS), batch_size=(4, 4), starts=("none",), dtypes=LOW),
)
def long_decoding_does_not_drift(trial: Trial) -> None:
    """The state is wide: after many segments of one token, low precision is as near float64 as after one segment."""
    exact, tolerance = trial.rebuilt(torch.float64), _after(STEPS, trial)
    x = trial.tokens()
    expected, _ = trial.mix(x.double(), None, exact)
    last = STEPS // 4
    expected = expected[:, -last:]

    start = exact.init_state(len(x), max_length=STEPS)
    stepped = torch.no_grad()(_step_by_step(trial, exact))

    def ends(x: Tensor, state: Any, rounds: bool) -> dict[str, Tensor]:
        return {"the output": stepped(x, state, rounds)[0][:, -last:]}

    moved = _moved(ends, x, start, trial.case.dtype)
    # several rows cost as much as one, each is looked at by itself, and one may be another path, of 16 bits perhaps
    alone = trial.case.seed == FIXED and trial.case.dtype != torch.float16
    for rows in (len(x), 1) if alone else (len(x),):
        given = trial.mixer.init_state(rows, max_length=STEPS)
        y, _ = trial.decode(x[:rows], given, trial.call(trial.reference))
        what = f"the last {last} of {STEPS} segments of one token in {trial.case.dtype}, one of {rows} rows"
        for row in torch.arange(rows).split(1):
            far = lambda name, row=row: moved(name)[row]  # noqa: E731
            near("the output", what, y[row, -last:], expected[row], tolerance, moved=far)


def _after(length: int, trial: Trial) -> float:
    """The tolerance after so many tokens: a decay that float32 rounds once is as many roundings off after as many."""
    dtype = trial.case.dtype
    return trial.subject.tolerances[dtype] * (max(1, length / 64) if dtype == torch.float32 else 1)


def _step_by_step(trial: Trial, exact: SequenceMixer) -> Rounded:
    """The exact map, of which the state is rounded to float32 after every token, if it is."""
    step, rounded = trial.call(trial.reference, exact), _rounding(torch.float32)

    def stepped(x: Tensor, state: Any, rounds: bool) -> tuple[Tensor, Any]:
        outputs = []
        for token in x.split(1, dim=1):
            y, state = step(token, rounded(state) if rounds else state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    return stepped


LENGTHY = Draw(
    lists=((2049,),),
    tokens=(LONG - 99, LONG),
    batch_size=(1, 1),
    starts=("none", "initial"),
    scales=(1.0, 20.0),
    dtypes=LOW,
    wide=30,
)


@check(use="long sequences in low precision: errors add up", share=0.04, long=True, draw=LENGTHY)
def long_segments_do_not_drift(trial: Trial) -> None:
    """At the end of hundreds of tokens low precision is as near float64 as at the start, in every paradigm, with
    extreme gates and decays too."""
    numbers = sum(leaf.numel() for leaf in to_dict(trial.initial_state(1) or ()).values())
    if trial.case.wide and numbers > LARGE_STATE:
        raise UnsatisfiedAssumption
    length = min(trial.case.length, WIDE) if trial.case.wide else trial.case.length
    while True:
        try:
            return _does_not_drift(trial, length)
        except SeqmixError:  # a table of positions may end
            if length <= LENGTHS[-1]:
                raise
            length //= 2


def _does_not_drift(trial: Trial, length: int) -> None:
    exact, dtype = trial.rebuilt(torch.float64), trial.case.dtype
    tolerance, last = _after(length, trial), length // 8
    x, state = trial.tokens(length=length), trial.state()
    x = x / trial.case.scale if dtype == torch.float16 else x  # whose largest number is 65,504

    def ends(y: Tensor, after: Any) -> dict[str, Tensor]:
        return named_results(y[:, -last:], after)

    expected = ends(*trial.mix(x.double(), _wide(state), exact))
    nearby = x.double() * (1 + torch.finfo(dtype).eps / 2 * trial.like(x).double())
    shifted = cache(lambda: ends(*trial.mix(nearby, _wide(state), exact)))
    if trial.mixer.traits.has_state:
        start = state or exact.init_state(1, max_length=length)
        stepped = torch.no_grad()(_step_by_step(trial, exact))
        rows_moved = _moved(lambda x, state, rounds: ends(*stepped(x, state, rounds)), x, start, dtype)
    else:
        rows_moved = _moved(lambda x, *_: ends(*trial.mix(x, None, exact)), x, None, dtype)
    for paradigm in trial.paradigms:
        again = state is None and trial.mixer.traits.takes_state(paradigm)
        # quadratic: of the default, from a state is enough, and of others hundreds of tokens
        spare = again or paradigm is not trial.mixer.paradigm
        if paradigm is Paradigm.PARALLEL and length > LONG and spare:
            continue
        found = ends(*trial.mix(x, state, paradigm=paradigm))
        what = f"{paradigm} in {dtype}, the last {last} of {length} tokens"
        for name, result in expected.items():
            ends_here = lambda name=name: shifted()[name]  # noqa: E731
            near(name, what, found[name], result, tolerance, moved=rows_moved, shifted=ends_here)
    if trial.case.wide and dtype == torch.float16:
        with suppress(SeqmixError):  # a table of positions may end
            _thousands_in_float16(trial, exact)


def _thousands_in_float16(trial: Trial, exact: SequenceMixer) -> None:
    """Sums over thousands of tokens and many channels leave float16 at 65,504."""
    x, paradigm = trial.tokens(1, THOUSANDS), trial.mixer.traits.prefer(Paradigm.CHUNKWISE, Paradigm.PARALLEL)
    x, last = x / trial.case.scale, THOUSANDS // 8

    def ends(x: Tensor, mixer: SequenceMixer) -> Tensor:
        return trial.mix(x, None, mixer, paradigm=paradigm)[0][:, -last:]

    shifted = partial(ends, x.double() * (1 + 2**-11 * trial.like(x).double()), exact)
    what = f"{paradigm} in float16, the last {last} of {THOUSANDS:,} tokens"
    near("the output", what, ends(x, trial.mixer), ends(x.double(), exact), _after(THOUSANDS, trial), shifted=shifted)


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
        if shifted(mixer).get(name):
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
        require(_is_copied(trial, name), f"{sentence}, so it is at least {mixer.state_dtype}")
    for paradigm in trial.paradigms:
        y, after = trial.mix(x, state, paradigm=paradigm)
        require(y.dtype == x.dtype, f"{paradigm}: the output is {y.dtype}, and the input is {x.dtype}")
        require(y.shape == x.shape, f"{paradigm}: the output is {list(y.shape)}, and the input is {list(x.shape)}")
        for name, leaf in to_dict(after).items():
            wanted = initial[name].dtype
            require(leaf.dtype == wanted, f"{paradigm}: the state's {name} is {leaf.dtype}, and init_state's {wanted}")
        # what has 16 bits is short after a few tokens, and what is added to a number of 24 bits is not
        many, taken = trial.tokens(length=MANY), mixer.traits.takes_state(paradigm)
        fine = trial.state(start="moved") if taken else None
        _, after = trial.mix(many, fine, paradigm=paradigm)
        # one token has code of its own
        _, stepped = trial.mix(many[:, :1], after, paradigm=paradigm) if taken else (None, after)
        leaves = [*to_dict(after).items(), *to_dict(stepped).items()]
        for name, leaf in leaves:
            if leaf.dtype == torch.float32 and _is_coarse(leaf):
                _, exact = trial.mix(many.double(), _wide(fine), trial.rebuilt(torch.float64))
                rounded = not _is_coarse(to_dict(exact)[name].float()) and not _is_copied(trial, name)
                sentence = f"{paradigm}: the state's {name} is float32, and all its numbers fit in 16 bits"
                require(not rounded, f"{sentence}: they were rounded")


def _is_copied(trial: Trial, leaf: str) -> bool:
    """Whether what a leaf holds after a token is, where it depends on what the leaf held before, one of those numbers,
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


def _is_coarse(leaf: Tensor) -> bool:
    """Whether the float32 numbers have the 10 bits of float16 or TF32, or the 7 of bfloat16; of a few, no telling."""
    numbers = leaf[(leaf != 0) & leaf.isfinite()]
    return numbers.numel() >= FEW and not (numbers.view(torch.int32) & 0x1FFF).any()


AUTOCAST = Draw(
    tokens=(16, 32), batch_size=(2, 2), starts=("none", "initial", "read"), uses=USES, dtypes=(torch.float32,)
)


@check(use="mixed precision (autocast)", share=0.06, draw=AUTOCAST)
def autocast_changes_only_precision(trial: Trial) -> None:
    """Under autocast to bfloat16, output, final state and gradients are near float64, packed documents too, and a
    state's leaves keep their dtypes."""
    device, length = trial.subject.device.type, trial.case.length
    x, state, exact = trial.tokens(), trial.state(), trial.rebuilt(torch.float64)
    initial = to_dict(trial.initial_state(trial.case.batch_size))
    packed: dict[str, Tensor] = {}
    if trial.mixer.traits.packing and trial.case.seed % 2:  # the rows as documents
        packed["cu_seqlens"] = torch.arange(0, x.numel() + 1, length, device=x.device)[: len(x) + 1]
        x = x.flatten(0, 1)[None]

    def under(what: str, paradigm: Paradigm) -> Call:
        used = trial.used(paradigm, **packed)

        def call(x: Tensor, state: Any) -> tuple[Tensor, Any]:
            with torch.autocast(device, torch.bfloat16):
                y, after = used(x, state)
            for name, leaf in to_dict(after or ()).items():
                sentence = f"{what}: the state's {name} is {leaf.dtype}, not {initial[name].dtype}"
                require(leaf.dtype == initial[name].dtype, sentence)
            return y, after

        return trial.kept(call) if packed else call

    whole = trial.call(trial.reference, exact, **packed)
    described = {f"{paradigm} under autocast, {trial.use}": paradigm for paradigm in trial.paradigms}
    calls = {what: under(what, paradigm) for what, paradigm in described.items()}
    _near_float64(trial, calls, trial.kept(whole) if packed else whole, x, state, exact, torch.bfloat16)


@check(
    use="training: extreme inputs give NaN or inf",
    share=0.06,
    draw=Draw(tokens=(1, 40), fixed=300, long=4, batch_size=(1, 1), dtypes=LOW),
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
    state = trial.state(len(inputs))
    for paradigm in trial.paradigms:
        results, after = trial.differentiate(trial.call(paradigm), torch.cat(list(inputs.values())), state)
        results |= named_leaves("the final state's", after)
        of_parameters = {f"the gradient of {name}" for name, _ in trial.mixer.named_parameters()}
        for name, tensor in results.items():
            whole = name in of_parameters
            for what, part in [(", ".join(inputs), tensor)] if whole else zip(inputs, tensor, strict=True):
                require(part.isfinite().all(), f"{paradigm} in {trial.case.dtype}, {what}: {name} is not finite")


def _wide(state):
    """A state with the dtypes that the float64 mixer's states have."""
    return (
        None
        if state is None
        else map_state(lambda x: x.to(torch.promote_types(x.dtype, torch.float64)) if is_inexact(x) else x, state)
    )


def _rounding(dtype: torch.dtype, seed: int = 0, times: int = 1) -> Callable[[Any], Any]:
    """What moves numbers in float64, or those of a state, at random by as much as two roundings to a dtype do, so many
    times."""
    generator, unit = torch.Generator().manual_seed(seed), times * torch.finfo(dtype).eps

    def rounded(leaf: Tensor) -> Tensor:
        noise = 2 * torch.rand(leaf.shape, generator=generator, dtype=torch.float64) - 1
        return leaf * (1 + unit * noise.to(leaf.device)) if is_inexact(leaf) else leaf.clone()

    return lambda state: None if state is None else map_state(rounded, state)


def _moved(
    exact: Callable[[Tensor, Any, bool], Mapping[str, Tensor]], x: Tensor, state: Any, dtype: torch.dtype
) -> Callable[[str], Tensor]:
    """How far each row of exact results moves, at most in a few draws, where what they are computed from is rounded,
    and so is what is on the way (`exact` with True). Where that crosses a threshold, or almost nothing is left of what
    cancels, no mixer is near."""

    @cache
    def rows() -> dict[str, Tensor]:
        # of the same call: another paradigm's result may differ by more than roundings
        results = exact(x.double(), _wide(state), False)
        moves = {name: torch.zeros_like(result.norm(dim=-1)) for name, result in results.items()}
        for seed, times in enumerate(DRAWS):
            inputs, before = _rounding(dtype, seed, times), _rounding(torch.float32, seed, times)
            found = exact(inputs(x.double()), before(_wide(state)), True)
            for name, far in moves.items():
                here = (found[name] - results[name]).norm(dim=-1)
                # what is smooth moves as many times further, and what jumps does not
                here = torch.where(here > JUMP * times * far, here, here / times) if times > 1 else here
                moves[name] = torch.maximum(far, here)
        return moves

    return lambda name: rows()[name]
