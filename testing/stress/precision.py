"""Checks of low precision at late positions, over many decoding steps, and under autocast."""

from typing import Any

import torch
from torch import Tensor

from ...mixers.base.state import to_dict
from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError
from ..check import LESS_PRECISE, check, positioned, shifted_leaves, stateful
from ..compare import require, require_near
from ..memory_limit import limited_memory
from ..mixer.case import FIXED, USES, Draw
from ..mixer.rounding import LOW, is_copied, require_near_float64, rows_moved, step_by_step, tolerance_after
from ..mixer.trial import SegmentCall, Trial, late_start

STEPS = 160
"""Number of tokens to decode one by one: enough for a state that is rounded at every token to drift."""


PIECE, ROUNDED = 7, 1e-6
"""Number of tokens of a piece at a late position, and tolerance there, where angles are rounded."""

LATE = Draw(
    tokens=(12, 24), fixed=40, batch_size=(2, 2), starts=("initial",), dtypes=(torch.float32, torch.bfloat16), wide=10
)


AUTOCAST = Draw(
    tokens=(16, 32), batch_size=(2, 2), starts=("none", "initial", "read"), uses=USES, dtypes=(torch.float32,)
)


@check(
    stateful,
    positioned,
    stress=True,
    use="long text in low precision: late positions are rounded",
    share=0.06,
    long=True,
    draw=LATE,
)
def late_positions_are_exact(trial: Trial) -> None:
    """At positions after a million and after 2^31 tokens, float32 (also under autocast) and bfloat16 are as near
    float64 as at the start, or the mixer refuses such positions."""
    exact, device = trial.rebuilt(torch.float64), trial.subject.device.type
    x, tolerances = trial.tokens(), trial.subject.tolerances
    for number, start in enumerate((10**6, 2**31 - 2)):
        in_pieces = trial.paradigms[(trial.case.seed + number) % len(trial.paradigms)]
        try:
            with limited_memory():
                expected, _ = trial.mix(x.double(), late_start(exact, len(x), start), exact, paradigm=trial.reference)
        except SeqmixError:
            return
        for paradigm in trial.paradigms:
            y, after = trial.mix(x, late_start(trial.mixer, len(x), start), paradigm=paradigm)
            what = f"{paradigm}, {trial.case.dtype} at position {start:,}"
            require_near("the output", what, y, expected, tolerances[trial.case.dtype])
            if trial.case.dtype == torch.float32:  # autocast rounds operands to 8 bits, perhaps those of angles too
                with torch.autocast(device, torch.bfloat16):
                    y, _ = trial.mix(x, late_start(trial.mixer, len(x), start), paradigm=paradigm)
                require_near("the output", f"{what} under autocast", y, expected, tolerances[torch.bfloat16])
            for name, leaf in to_dict(after).items():
                if shifted_leaves(trial.mixer, start).get(name):
                    sentence = f"{paradigm}: expected the state's {name} to be at least {start:,}"
                    require((leaf >= start).all(), f"{sentence}, got {leaf.min().item():,}: use int64 for positions")
        pieces, between = [], late_start(exact, len(x), start)
        for piece in x.double().split(PIECE, dim=1):
            z, between = trial.mix(piece, between, exact, paradigm=in_pieces)
            pieces.append(z)
        what = f"{in_pieces} at position {start:,}, pieces against the whole"
        trial.compare(what, (torch.cat(pieces, dim=1), None), (expected, None), ROUNDED)


@check(
    stateful,
    stress=True,
    use="long decoding in low precision: errors add up",
    remedy=LESS_PRECISE,
    share=0.02,
    long=True,
    draw=Draw(tokens=(STEPS, STEPS), batch_size=(4, 4), starts=("none",), dtypes=LOW),
)
def long_decoding_does_not_drift(trial: Trial) -> None:
    """After many segments of one token, low precision is as near float64 as after a single segment: the state keeps
    enough bits."""
    exact, tolerance = trial.rebuilt(torch.float64), tolerance_after(STEPS, trial)
    x = trial.tokens()
    expected, _ = trial.mix(x.double(), None, exact)
    last = STEPS // 4
    expected = expected[:, -last:]

    start = exact.init_state(len(x), max_length=STEPS)
    stepped = torch.no_grad()(step_by_step(trial, exact))

    def ends(x: Tensor, state: Any, rounds_states: bool) -> dict[str, Tensor]:
        return {"the output": stepped(x, state, rounds_states)[0][:, -last:]}

    row_moves = rows_moved(ends, x, start, trial.case.dtype)
    # several rows take no longer than one, and each is compared alone; a single row may have its own code path
    one_row_too = trial.case.seed == FIXED and trial.case.dtype != torch.float16
    for rows in (len(x), 1) if one_row_too else (len(x),):
        initial = trial.mixer.init_state(rows, max_length=STEPS)
        y, _ = trial.decode(x[:rows], initial, trial.call(trial.reference))
        what = f"the last {last} of {STEPS} segments of one token in {trial.case.dtype}, one of {rows} rows"
        for row in torch.arange(rows).split(1):
            moves_of_row = lambda name, row=row: row_moves(name)[row]  # noqa: E731
            require_near("the output", what, y[row, -last:], expected[row], tolerance, row_moves=moves_of_row)


@check(
    stress=True,
    use="mixed precision (autocast): results change by more than rounding",
    remedy=LESS_PRECISE,
    share=0.06,
    draw=AUTOCAST,
)
def autocast_changes_only_precision(trial: Trial) -> None:
    """Under autocast to bfloat16, output, final state and gradients are near float64, also for packed documents. The
    leaves of a state keep their dtypes, except those of a cache."""
    device, length = trial.subject.device.type, trial.case.length
    x, state, exact = trial.tokens(), trial.state(), trial.rebuilt(torch.float64)
    initial = to_dict(trial.initial_state(trial.case.batch_size))
    packed: dict[str, Tensor] = {}
    if trial.mixer.traits.packing and trial.case.seed % 2:  # pack the rows as documents
        packed["cu_seqlens"] = torch.arange(0, x.numel() + 1, length, device=x.device)[: len(x) + 1]
        x = x.flatten(0, 1)[None]

    def under_autocast(what: str, paradigm: Paradigm) -> SegmentCall:
        used = trial.used(paradigm, **packed)

        def call(x: Tensor, state: Any) -> tuple[Tensor, Any]:
            with torch.autocast(device, torch.bfloat16):
                y, after = used(x, state)
            for name, leaf in to_dict(after or ()).items():
                if leaf.dtype != initial[name].dtype:
                    sentence = f"{what}: expected the state's {name} in {initial[name].dtype}, got {leaf.dtype}"
                    require(is_copied(trial, name), sentence)
                    trial.notes.append(f"{sentence}; this is allowed in a cache, whose numbers are only copied")
            return y, after

        return trial.without_growing_state(call) if packed else call

    whole = trial.call(trial.reference, exact, **packed)
    descriptions = {f"{paradigm} under autocast, {trial.use}": paradigm for paradigm in trial.paradigms}
    calls = {what: under_autocast(what, paradigm) for what, paradigm in descriptions.items()}
    require_near_float64(
        trial, calls, trial.without_growing_state(whole) if packed else whole, x, state, exact, torch.bfloat16
    )
