"""Checks of absolute positions: whether they matter, and that late positions work like early ones."""

from typing import Any

import torch
from torch import Tensor

from ...mixers.base.contract import SequenceMixer
from ...mixers.base.state import is_inexact, to_dict
from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError
from ..check import NOT_INVARIANT, check, exact_gradients, invariant, positioned, shiftable, shifted_leaves, stateful
from ..compare import EXACT, require
from ..memory_limit import limited_memory
from ..mixer.case import FIXED, Draw
from ..mixer.trial import Trial, late_start

MANY = 400
"""Number of tokens after which a position matters to a mixer that chooses blocks; short texts it reads as a whole."""

PREFIX, FARTHEST = 64, 8192
"""Least and greatest number of tokens before the earlier of two positions: enough to fill the cache of a window."""

BOUNDARIES = tuple(2**power - 4 for power in range(7, 14))
"""Positions from which a few tokens cross a boundary of blocks."""

ROUNDED = 1e-6
"""Allowed change of an output due to rounding of the angles of late positions."""

REPEATED = 840
"""Repetitions of a token after which a decaying memory no longer changes; a multiple of most ring buffers' sizes."""

ENORMOUS, ROWS = 1000.0, 32
"""Scale of tokens so large that attention may give them the weight 0, and number of such tokens to try."""

UNSEEN = 1e-12
"""Largest difference of the outputs after two prefixes at which the prefixes count as unseen."""

AHEAD, FAR = (8, 9, 10, 11), 301
"""Lengths of the usual prefixes, and of a long one that is tried once."""

BLANK = (16, 17, 300)
"""Lengths of prefixes of zeros."""


@check(
    stateful,
    shiftable,
    use="long text: late tokens are processed differently from early ones",
    remedy=NOT_INVARIANT,
    share=0.02,
    draw=Draw(tokens=(9, 9), batch_size=(2, 2), starts=("initial",), options=True),
)
def position_matters_only_where_declared(trial: Trial) -> None:
    """If shift invariance is declared, the same tokens give the same outputs after 64, a million and 2^31 others, or
    the mixer refuses so many. If it is not declared, the position changes the outputs."""
    x = trial.tokens()
    declared = trial.mixer.traits.shift_invariant
    of_single_option = trial.case.seed == FIXED and trial.case.options  # one of many such cases: a near shift is enough
    if positioned(trial.config, trial.mixer):
        if not of_single_option:
            _require_counts_not_to_matter(trial, x)
        return
    slots = [size for leaf in to_dict(trial.mixer.init_state(1)).values() for size in leaf.shape[1:]]
    # an odd number, because a position modulo a power of two would be the same after 64
    first = min(max(PREFIX, *slots), FARTHEST) + 1
    for paradigm in trial.paradigms:
        early = _outputs(trial, x, first, paradigm)

        def change(start, paradigm=paradigm, x=x, early=early):
            try:
                with limited_memory():
                    return (_outputs(trial, x, start, paradigm) - early).abs().max().item()
            except SeqmixError:  # the mixer refuses so many tokens, such as one with a table of positions
                return 0.0

        if not declared:
            # far positions alone would not do: a mean over the prefix hardly changes after a few dozen tokens
            matters = any(change(start) > EXACT for start in (0, 1000, *BOUNDARIES))
            if not matters:
                many = trial.tokens(length=MANY)
                matters = change(0, x=many, early=_outputs(trial, many, first, paradigm)) > EXACT
            # a flag in the state, such as "has begun", depends on the position too, and shift_state leaves it alone
            require(
                matters or _has_flags(trial.mixer),
                f"{paradigm}: traits.shift_invariant is False, but no shift changes the output",
            )
            continue
        # the last start crosses the range of 32-bit integers, where angles are rounded to 1e-6
        starts = ((first + 937, 1e-8), (10**6, 1e-8), (2**31 - 4, 1e-5))
        for start, allowed in starts[: 1 if of_single_option else 3]:
            difference = change(start)
            later = f"{start - first:,} tokens later the same tokens give an output that is off by {difference:.1e}"
            require(difference <= allowed, f"{paradigm}: traits.shift_invariant is True, but {later}")


@check(
    invariant,
    exact_gradients,
    use="a prompt that is cut off or padded: the results of later tokens change",
    remedy=NOT_INVARIANT,
    share=0.02,
    draw=Draw(tokens=(7, 7), batch_size=(1, 1), starts=("none",), options=True, chunk_size=16),
)
def an_unseen_prefix_changes_nothing(trial: Trial) -> None:
    """If shift invariance is declared and a prefix has no effect on a token, because it is outside a window or has the
    weight 0, then longer prefixes have no effect either, not even of hundreds of tokens."""
    x, longest = trial.tokens(1, 7), AHEAD[-1]
    # a repeated, enormous token gets the weight 0 if its score is negative; a constant state may count it all the same
    rows = 0 if trial.mixer.traits.state == "constant" else ROWS
    repeated, random = ENORMOUS * trial.tokens(rows, 1).expand(-1, longest, -1), trial.tokens(2, longest)

    def last_output(prefix: Tensor) -> Tensor:
        return trial.mix(torch.cat((prefix, x.expand(len(prefix), -1, -1)), dim=1), None)[0][:, -1]

    outputs = torch.stack([last_output(torch.cat((repeated, random))[:, :length]) for length in AHEAD])
    same = ((outputs[:, :, None] - outputs[:, None]).abs() <= UNSEEN).all(-1).all(0)
    pairs = same.triu(1).nonzero()
    changes = (outputs - outputs[0])[:, pairs.unique()].abs()
    largest = changes.max() if changes.numel() else 0
    sentence = "traits.shift_invariant is True, but {} more tokens without any weight change the output by {:.1e}"
    require(not changes.numel() or changes.max() <= ROUNDED, sentence.format("a few", largest))
    pairs = pairs[pairs[:, 1] < rows]
    if len(pairs) and trial.case.seed == 0 and trial.mixer.paradigm is not Paradigm.RECURRENT:
        far = last_output(repeated[pairs[0], :1].expand(-1, FAR, -1))
        change = (far - outputs[0, pairs[0]]).abs().max().item()
        seen = (far[0] - far[1]).abs().max() > UNSEEN  # a rotation may make the scores of far tokens positive
        require(seen or change <= ROUNDED, sentence.format(f"{FAR:,}", change))
    if trial.case.seed == 0 and Paradigm.CHUNKWISE in trial.paradigms:  # other paradigms take too long
        _require_zeros_not_to_matter(trial, x)


def _require_zeros_not_to_matter(trial: Trial, x: Tensor) -> None:
    """If 16 and 17 tokens of zeros before x give the same, hundreds of them have to give the same too."""
    texts = (torch.cat((x.new_zeros(1, length, x.shape[2]), x), dim=1) for length in BLANK)
    few, more, many = (trial.mix(text, None, paradigm=Paradigm.CHUNKWISE)[0][:, -x.shape[1] :] for text in texts)
    if torch.allclose(few, more, 0, UNSEEN):
        change = (many - few).abs().max().item()
        sentence = "traits.shift_invariant is True, but {} zeros change the output by {:.1e}, whereas {} do not"
        require(change <= ROUNDED, sentence.format(BLANK[-1], change, BLANK[1]))


def _require_counts_not_to_matter(trial: Trial, x: Tensor) -> None:
    """Fail if integer leaves that only count tokens, and that `shift_state` does not know, change the output.

    A token is repeated until nothing else in the state changes.
    """
    prefix = trial.tokens(length=1).expand(-1, REPEATED, -1)
    try:
        _, early = trial.mix(prefix, None)
        _, late = trial.mix(prefix, early)
    except SeqmixError:  # the mixer has a table of fewer positions
        return
    before, after = to_dict(early), to_dict(late)
    counts = [name for name, leaf in before.items() if torch.equal(after[name], leaf + REPEATED)]
    same = all(_close(after[name], leaf) for name, leaf in before.items() if name not in counts)
    for paradigm in trial.paradigms if same else ():
        y, y_later = (trial.mix(x, state, paradigm=trial.after(paradigm))[0] for state in (early, late))
        what = f"{paradigm}, {REPEATED} tokens later, which changed {' and '.join(counts)} alone, against before"
        trial.compare(what, (y_later, None), (y, None))


def _has_flags(mixer: SequenceMixer[Any]) -> bool:
    """Return True if the state has integers or booleans that are not positions."""
    positions, before = shifted_leaves(mixer, 1), to_dict(mixer.init_state(1))
    return any(not positions.get(name) for name, leaf in before.items() if not is_inexact(leaf))


def _close(x: Tensor, y: Tensor) -> bool:
    """Return True if two tensors have the same shape and nearly equal numbers."""
    return x.shape == y.shape and torch.allclose(x.double(), y.double(), EXACT / 10, EXACT / 10)


def _outputs(trial: Trial, x: Tensor, start: int, paradigm: Any) -> Tensor:
    """Return the outputs from a later position: in two pieces, and also packed if the mixer can pack; as one vector."""
    boundaries = torch.tensor([0, 4, x.shape[1]], device=trial.subject.device)
    state = late_start(trial.mixer, len(x), start)
    y1, between = trial.mix(x[:, :5], state, paradigm=paradigm)
    y2, _ = trial.mix(x[:, 5:], between, paradigm=paradigm)
    outputs = [y1, y2]
    if trial.mixer.traits.packing:
        outputs.append(trial.mix(x[:1], state, paradigm=paradigm, cu_seqlens=boundaries)[0])
    return torch.cat([y.flatten() for y in outputs])
