"""Absolute position: where it matters, and that late positions are as good as early ones."""

from typing import Any

import torch
from torch import Tensor

from ...mixers.contract import SequenceMixer
from ...mixers.state import is_inexact, to_dict
from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError
from ..check import NOT_INVARIANT, check, exact_gradients, invariant, positioned, shiftable, shifted_leaves, stateful
from ..compare import EXACT, require
from ..memory_limit import limited_memory
from ..mixer.case import FIXED, Draw
from ..mixer.trial import Trial, late_start

PREFIX, FARTHEST = 64, 8192
"""Prefix length of the earlier of two positions, at least and at most: a window's cache is full (of zeros) then."""

BOUNDARIES = tuple(2**power - 4 for power in range(7, 14))
"""Positions from which a few tokens cross a boundary of blocks."""

ROUNDED = 1e-6
"""How far an output moves at most where angles of late positions are rounded."""

REPEATED = 840
"""Tokens after which a memory that fades no longer changes; a multiple of the number of slots that most rings have."""

ENORMOUS, ROWS = 1000.0, 32
"""How large tokens are that may have no weight, and how many are tried."""

UNSEEN = 1e-12
"""How far outputs are apart at most where of two prefixes nothing is read."""

AHEAD, FAR = (8, 9, 10, 11), 301
"""Lengths of prefixes, and of one that is tried once."""

BLANK = (16, 17, 300)
"""Lengths of prefixes of zeros."""


@check(
    stateful,
    shiftable,
    use="long text: late tokens are mixed in another way than early ones",
    remedy=NOT_INVARIANT,
    share=0.04,
    draw=Draw(tokens=(9, 9), batch_size=(2, 2), starts=("initial",), options=True),
)
def position_matters_only_where_declared(trial: Trial) -> None:
    """Where shift invariance is declared, the same tokens give the same after 64, a million and 2^31 others, or so many
    are refused; elsewhere they do not."""
    x, boundaries = trial.tokens(), torch.tensor([0, 4, 9], device=trial.subject.device)
    declared = trial.mixer.traits.shift_invariant
    swept = trial.case.seed == FIXED and trial.case.options  # an option's value: a near shift is enough
    if positioned(trial.config, trial.mixer):
        if not swept:
            _no_count_matters(trial, x)
        return
    slots = [size for leaf in to_dict(trial.mixer.init_state(1)).values() for size in leaf.shape[1:]]
    # odd, as a clock may count what 64 is a multiple of
    first = min(max(PREFIX, *slots), FARTHEST) + 1
    for paradigm in trial.paradigms:
        early = _outputs(trial, x, boundaries, first, paradigm)

        def change(start, paradigm=paradigm, early=early):
            try:
                with limited_memory():
                    return (_outputs(trial, x, boundaries, start, paradigm) - early).abs().max().item()
            except SeqmixError:  # of a mixer that has processed as many tokens as it can, or has a table of them
                return 0.0

        if not declared:
            # a normaliser over the prefix may be all but constant after a few dozen tokens
            moves = any(change(start) > EXACT for start in (0, 1000, *BOUNDARIES))
            # a flag of what was begun tells a position too, and is not shifted
            require(
                moves or _has_flags(trial.mixer),
                f"{paradigm}: traits.shift_invariant is False, and no shift changes anything",
            )
            continue
        # the last crosses what a 32-bit integer holds; angles there are rounded to 1e-6
        for start, allowed in ((first + 937, 1e-8), (10**6, 1e-8), (2**31 - 4, 1e-5))[: 1 if swept else 3]:
            off = change(start)
            later = f"{start - first:,} tokens later the same tokens give an output that is {off:.1e} off"
            require(off <= allowed, f"{paradigm}: traits.shift_invariant is True, and {later}")


@check(
    invariant,
    exact_gradients,
    use="a prompt that is cut off or padded: blocks, or positions, move with it",
    remedy=NOT_INVARIANT,
    share=0.03,
    draw=Draw(tokens=(7, 7), batch_size=(1, 1), starts=("none",), options=True, chunk_size=16),
)
def an_unseen_prefix_changes_nothing(trial: Trial) -> None:
    """Where shift invariance is declared, a token that gives the same after two prefixes, which are out of a window or
    have no weight, gives the same after longer ones, of hundreds of tokens too."""
    x, longest = trial.tokens(1, 7), AHEAD[-1]
    # of one token, enormous scores are negative for some, so that its weight is 0; a constant state may count such
    rows = 0 if trial.mixer.traits.state == "constant" else ROWS
    one, few = ENORMOUS * trial.tokens(rows, 1).expand(-1, longest, -1), trial.tokens(2, longest)

    def last(prefix: Tensor) -> Tensor:
        return trial.mix(torch.cat((prefix, x.expand(len(prefix), -1, -1)), dim=1), None)[0][:, -1]

    outputs = torch.stack([last(torch.cat((one, few))[:, :length]) for length in AHEAD])
    same = ((outputs[:, :, None] - outputs[:, None]).abs() <= UNSEEN).all(-1).all(0)
    pairs = same.triu(1).nonzero()
    moved = (outputs - outputs[0])[:, pairs.unique()].abs()
    sentence = "traits.shift_invariant is True, and {} more tokens of which nothing is read move the output by {:.1e}"
    require(not moved.numel() or moved.max() <= ROUNDED, sentence.format("a few", moved.max() if moved.numel() else 0))
    pairs = pairs[pairs[:, 1] < rows]
    if len(pairs) and trial.case.seed == 0 and trial.mixer.paradigm is not Paradigm.RECURRENT:
        far = last(one[pairs[0], :1].expand(-1, FAR, -1))
        off = (far - outputs[0, pairs[0]]).abs().max().item()
        seen = (far[0] - far[1]).abs().max() > UNSEEN  # a rotation turns scores
        require(seen or off <= ROUNDED, sentence.format(f"{FAR:,}", off))
    if trial.case.seed == 0 and Paradigm.CHUNKWISE in trial.paradigms:  # others are quadratic or go token by token
        _zeros_move_nothing(trial, x)


def _zeros_move_nothing(trial: Trial, x: Tensor) -> None:
    """Where zeros leave no trace, how many were read does not matter."""
    texts = (torch.cat((x.new_zeros(1, length, x.shape[2]), x), dim=1) for length in BLANK)
    few, more, many = (trial.mix(text, None, paradigm=Paradigm.CHUNKWISE)[0][:, -x.shape[1] :] for text in texts)
    if torch.allclose(few, more, 0, UNSEEN):
        off = (many - few).abs().max().item()
        sentence = "traits.shift_invariant is True, and {} zeros move the output by {:.1e}, where {} move nothing"
        require(off <= ROUNDED, sentence.format(BLANK[-1], off, BLANK[1]))


def _no_count_matters(trial: Trial, x: Tensor) -> None:
    """Of a state without a position: where a token that is read again and again changes integers that count alone, the
    counts may not matter."""
    prefix = trial.tokens(length=1).expand(-1, REPEATED, -1)
    try:
        _, early = trial.mix(prefix, None)
        _, late = trial.mix(prefix, early)
    except SeqmixError:  # a table of positions may end
        return
    before, after = to_dict(early), to_dict(late)
    counts = [name for name, leaf in before.items() if torch.equal(after[name], leaf + REPEATED)]
    same = all(_close(after[name], leaf) for name, leaf in before.items() if name not in counts)
    for paradigm in trial.paradigms if same else ():
        y, y_later = (trial.mix(x, state, paradigm=trial.after(paradigm))[0] for state in (early, late))
        what = f"{paradigm}, {REPEATED} tokens later, which changed {' and '.join(counts)} alone"
        trial.compare(what, (y_later, None), (y, None))


def _has_flags(mixer: SequenceMixer[Any]) -> bool:
    """True if a state has integers or booleans that a shift of positions leaves alone."""
    counts, before = shifted_leaves(mixer, 1), to_dict(mixer.init_state(1))
    return any(not counts.get(name) for name, leaf in before.items() if not is_inexact(leaf))


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), EXACT / 10, EXACT / 10)


def _outputs(trial: Trial, x: Tensor, boundaries: Tensor, start: int, paradigm: Any) -> Tensor:
    """In two pieces, and packed where that is declared."""
    state = late_start(trial.mixer, len(x), start)
    y1, between = trial.mix(x[:, :5], state, paradigm=paradigm)
    y2, _ = trial.mix(x[:, 5:], between, paradigm=paradigm)
    outputs = [y1, y2]
    if trial.mixer.traits.packing:
        outputs.append(trial.mix(x[:1], state, paradigm=paradigm, cu_seqlens=boundaries)[0])
    return torch.cat([y.flatten() for y in outputs])
