"""Check of segments of hundreds and thousands of tokens, where blocks, tables of positions and windows end."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...mixers.base.contract import SequenceMixer
from ...mixers.base.state import clone, concatenate
from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError
from ..check import check
from ..compare import EXACT
from ..mixer.case import LENGTHS, Draw
from ..mixer.options import chunk_sizes
from ..mixer.trial import Trial

MOVED = 3.0
"""Amount added to all vector parameters, such as gate biases: enough to open or close a gate."""


BLOCKS = (256, 512, 1024)
"""Lengths in tokens that are whole numbers of blocks."""


HEAD = 9
"""Number of tokens of a short first piece, or beyond the end of a block."""

CONTEXT = 8192
"""Number of positions that tables of positions often have."""


@check(
    stress=True,
    use="long sequences: code that splits them into blocks of a thousand tokens has wrong results or gradients",
    share=0,
    long=True,
    # more chunks than an 8-bit integer can count; smaller chunks would take longer
    draw=Draw(tokens=(1030, 1160), batch_size=(1, 1), starts=("read",), chunk_size=16),
)
def thousands_of_tokens_agree(trial: Trial) -> None:
    """All paradigms give the same for thousands of tokens. At a thousand tokens the output, final state and gradients
    agree (at hundreds for a quadratic paradigm that is not the default); at two thousand the output and final state,
    also for packed documents and large chunks. After four thousand tokens, decoding steps equal the whole, and
    chunkwise gradients equal those of two halves. At 8,201 tokens, the whole equals its pieces."""
    text, stepped = _longest_segment(trial)
    length, state = text.shape[1], trial.state()
    quarter, half = text[:, : length // 4], text[:, : length // 2]
    expected = cache(lambda length: trial.differentiate(trial.call(trial.reference), quarter[:, :length], state))
    whole = trial.mix(half, state, paradigm=trial.reference)
    for paradigm in {*trial.paradigms, trial.mixer.paradigm} - {trial.reference}:
        part = _limit_length(trial, paradigm, quarter, BLOCKS[1] + HEAD)
        actual = trial.differentiate(trial.used(paradigm), part, state, used=True)
        what = f"{paradigm} against {trial.reference}, {part.shape[1]:,} tokens"
        trial.compare(what, actual, expected(part.shape[1]))
        part = _limit_length(trial, paradigm, half)
        y, after = trial.mix(part, state, paradigm=paradigm)
        complete = part.shape == half.shape
        what = f"{paradigm} against {trial.reference}, without gradients"
        expected_part = (whole[0][:, : part.shape[1]], whole[1] if complete else None)
        trial.compare(what, (y, after if complete else None), expected_part)
    beginning, _ = trial.mix(half, None)
    _compare_without_states(trial, half, beginning)
    _compare_documents(trial, half)
    _compare_large_chunks(trial, half, state, whole)
    _compare_gradients_of_halves(trial, text)
    _compare_whole_blocks(trial, text, state)
    # four thousand tokens from the start without a final state, the call that scores a text
    y, _ = trial.mix(text, None, return_state=False)
    what = f"{trial.mixer.paradigm}, the first of {length:,} tokens against {half.shape[1]:,}"
    trial.compare(what, (y[:, : half.shape[1]], None), (beginning, None))
    if stepped is not None:
        what = f"steps after {length - 2:,} tokens against {trial.mixer.paradigm}"
        trial.compare(what, (stepped, None), (y[:, -2:], None))
        _compare_beyond_context(trial)


def _compare_beyond_context(trial: Trial) -> None:
    """Compare 8,201 tokens at once with pieces of 1,023: tables of positions often end at 8,192.

    So many chunks also need a second level in a scan over chunks.
    """
    if Paradigm.CHUNKWISE not in trial.paradigms:  # other paradigms take too long
        return
    text, state, outputs, mixer = trial.tokens(1, CONTEXT + HEAD), None, [], _with_few_heads(trial)
    try:
        whole, _ = trial.mix(text, None, mixer, paradigm=Paradigm.CHUNKWISE, return_state=False)
    except SeqmixError:  # the mixer has a table of fewer positions
        return
    for piece in text.split(BLOCKS[-1] - 1, dim=1):
        y, state = trial.mix(piece, state, mixer, paradigm=Paradigm.CHUNKWISE)
        outputs.append(y)
    what = f"chunkwise, {text.shape[1]:,} tokens at once against pieces of {BLOCKS[-1] - 1:,}"
    trial.compare(what, (whole, None), (torch.cat(outputs, dim=1), None))


def _with_few_heads(trial: Trial, dtype: torch.dtype = torch.float64) -> SequenceMixer:
    """Return the mixer; one whose state grows has one head, if possible, because it takes quadratic time."""
    options = {**trial.case.options, "n_heads": 1} if trial.mixer.traits.state == "growing" else trial.case.options
    mixer = trial.subject.mixer(options, dtype, trial.case.layer)
    return trial.rebuilt(dtype) if mixer is None else mixer


def _limit_length(trial: Trial, paradigm: Paradigm, text: Tensor, longest: int = BLOCKS[-1] + HEAD) -> Tensor:
    """Return the text, cut to a length if the paradigm takes quadratic time and is not the default."""
    quadratic = paradigm is Paradigm.PARALLEL and paradigm is not trial.mixer.paradigm
    return text[:, :longest] if quadratic else text


def _compare_without_states(trial: Trial, text: Tensor, whole: Tensor) -> None:
    """Compare outputs of calls without a final state with those of the whole segment, also at whole numbers of blocks.

    At these lengths, a Fourier transform without padding wraps around.
    """
    for paradigm in trial.paradigms:
        longest = _limit_length(trial, paradigm, text).shape[1]
        blocks = BLOCKS if longest == text.shape[1] else BLOCKS[:-1]
        if paradigm is Paradigm.RECURRENT:  # it has no blocks
            blocks = ()
        for length in (longest, *blocks):
            y, _ = trial.mix(text[:, :length], None, paradigm=paradigm, return_state=False)
            what = f"{paradigm}, {y.shape[1]:,} tokens, return_state=False"
            trial.compare(what, (y, None), (whole[:, :length], None))


def _compare_documents(trial: Trial, text: Tensor) -> None:
    """Compare packed documents with each alone. Some are a thousand tokens long, some begin at boundaries of blocks."""
    if not trial.mixer.traits.packing:
        return
    length = text.shape[1]
    keep_state = trial.mixer.traits.state == "constant"
    for starts in ((0, length * 5 // 8), (0, *BLOCKS, 2 * BLOCKS[-1])):
        ends = torch.tensor([*(start for start in starts if start < length), length], device=text.device)
        alone = [trial.mix(part, None) for part in text.split(ends.diff().tolist(), dim=1)]
        expected = torch.cat([y for y, _ in alone], dim=1)
        after = concatenate([state for _, state in alone]) if keep_state else None
        y, packed = trial.mix(text, None, cu_seqlens=ends)
        what = f"documents that begin at {', '.join(map(str, ends[:-1].tolist()))} of {length:,}, packed against alone"
        trial.compare(what, (y, packed if keep_state else None), (expected, after))
    # other paradigms take too long for all tokens
    short = ends.clamp(max=min(length, BLOCKS[-1] + HEAD)).unique()
    for paradigm in {*trial.paradigms} - {trial.mixer.paradigm, Paradigm.RECURRENT}:
        y, _ = trial.mix(text[:, : short[-1]], None, paradigm=paradigm, cu_seqlens=short)
        trial.compare(f"{paradigm}, {what}", (y, None), (expected[:, : short[-1]], None))


def _compare_large_chunks(trial: Trial, text: Tensor, state: Any, whole: tuple[Tensor, Any]) -> None:
    """Compare the configured chunk size, and those of hundreds of tokens that are accepted, with the reference."""
    if Paradigm.CHUNKWISE not in trial.paradigms:
        return
    accepts = lambda size: trial.subject.accepts({**trial.case.options, **size})  # noqa: E731
    for size in chunk_sizes(trial.subject.config, accepts, candidates=BLOCKS):
        chunked = trial.mix(text, state, trial.rebuilt(chunk_size=size), paradigm=Paradigm.CHUNKWISE)
        trial.compare(f"chunks of {size} on {text.shape[1]:,} tokens against {trial.reference}", chunked, whole)


def _compare_gradients_of_halves(trial: Trial, text: Tensor) -> None:
    """Compare gradients of a whole text with those of two halves, in the chunkwise paradigm.

    It is the only paradigm that is both linear in memory and processed in blocks.
    """
    if Paradigm.CHUNKWISE not in trial.paradigms:
        return
    # with a growing state the chunkwise paradigm takes quadratic time; float32 halves it
    dtype, tolerance = (torch.float32, 1e-4) if trial.mixer.traits.state == "growing" else (trial.case.dtype, EXACT)
    text, mixer, half = text.to(dtype), _with_few_heads(trial, dtype), text.shape[1] // 2
    call = trial.call(Paradigm.CHUNKWISE, mixer)

    def in_halves(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        first, between = call(x[:, :half], state)
        second, after = call(x[:, half:], between)
        return torch.cat((first, second), dim=1), after

    what = f"chunkwise, {text.shape[1]:,} tokens at once against two halves"
    whole, halves = (trial.differentiate(each, text, None, mixer=mixer) for each in (call, in_halves))
    trial.compare(what, whole, halves, tolerance)


def _compare_whole_blocks(trial: Trial, text: Tensor, state: Any) -> None:
    """Compare paradigms on whole numbers of blocks, with vector parameters (gate biases, decays) raised and lowered.

    In one of the two directions the mixer forgets slowly, so that errors at a distance show.
    """
    for shift in (MOVED, -MOVED) if trial.mixer.traits.has_state else ():
        mixer = trial.rebuilt()
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(shift if parameter.ndim == 1 else 0)
        start, after, y = 0, state, text[:, :0]
        for length in (length for length in BLOCKS if length + HEAD <= text.shape[1]):
            y_next, after = trial.mix(text[:, start:length], after, mixer, paradigm=trial.reference)
            y = torch.cat((y, y_next), dim=1)
            if not y.isfinite().all():  # the mixer cannot have such parameters
                break
            for paradigm in {*trial.paradigms} - {trial.reference}:
                actual = trial.mix(text[:, :length], state, mixer, paradigm=paradigm)
                what = f"{paradigm}, {length} tokens against {trial.reference}, vector parameters moved by {shift:g}"
                trial.compare(what, actual, (y, after))
            start = length
        else:
            token = text[:, start : start + 1]
            y, _ = trial.decode(token, clone(after), trial.call(trial.reference, mixer))
            whole, _ = trial.mix(text[:, : start + 1], state, mixer)
            what = f"a step after {start} tokens against the whole, vector parameters moved by {shift:g}"
            trial.compare(what, (y, None), (whole[:, start:], None))


def _longest_segment(trial: Trial) -> tuple[Tensor, Tensor | None]:
    """Return a segment of four times the case's tokens, or as many as the mixer accepts, and the steps at its end.

    The steps are the outputs of the last two tokens, decoded one by one; None if the mixer has no state.
    """
    text = trial.tokens(length=4 * trial.case.length)
    while True:
        try:
            if not trial.mixer.traits.has_state:
                trial.mix(text, None)
                return text, None
            _, after = trial.mix(text[:, :HEAD], None)
            _, after = trial.mix(text[:, HEAD:-2], after)
            return text, trial.decode(text[:, -2:], after, trial.call(trial.reference))[0]
        except SeqmixError:
            if text.shape[1] < LENGTHS[0]:
                raise
            text = text[:, : text.shape[1] // 2]
