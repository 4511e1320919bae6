"""Segments of hundreds and thousands of tokens: blocks, tables of positions and windows end there."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...mixers.contract import SequenceMixer
from ...mixers.state import clone, concatenate
from ...ops.runtime.paradigm import Paradigm
from ...registry import SeqmixError
from ..check import check
from ..compare import EXACT
from ..mixer.case import LENGTHS, Draw
from ..mixer.options import chunk_sizes
from ..mixer.trial import Trial

MOVED = 3.0
"""How far vectors are moved: by so much a gate is open, or closed."""


BLOCKS = (256, 512, 1024)
"""Tokens that blocks divide."""


HEAD = 9
"""Tokens read before thousands, or of a document that begins after a block."""

CONTEXT = 8192
"""Tokens that a table of positions often has rows for."""


@check(
    stress=True,
    use="long sequences: what is cut into blocks of a thousand tokens is another map, or has another gradient",
    share=0,
    long=True,
    # more chunks than 8 bits count; smaller ones take longer
    draw=Draw(tokens=(1030, 1160), batch_size=(1, 1), starts=("read",), chunk_size=16),
)
def thousands_of_tokens_agree(trial: Trial) -> None:
    """At a thousand tokens every paradigm gives the same output, final state and gradients (a quadratic one that is not
    the default at hundreds), at two thousand the same output and final state, of packed documents and in large chunks
    too; after four thousand one token at a time gives what the whole does, of which no final state is wanted, chunkwise
    gradients are those of two halves; and 8,201 at once give what pieces do."""
    text, stepped = _as_long_as_it_takes(trial)
    length, state = text.shape[1], trial.state()
    x, more = text[:, : length // 4], text[:, : length // 2]
    expected = cache(lambda length: trial.differentiate(trial.call(trial.reference), x[:, :length], state))
    whole = trial.mix(more, state, paradigm=trial.reference)
    for paradigm in {*trial.paradigms, trial.mixer.paradigm} - {trial.reference}:
        part = _as_many(trial, paradigm, x, BLOCKS[1] + HEAD)
        actual = trial.differentiate(trial.used(paradigm), part, state, used=True)
        what = f"{paradigm} against {trial.reference}, {part.shape[1]:,} tokens"
        trial.compare(what, actual, expected(part.shape[1]))
        part = _as_many(trial, paradigm, more)
        y, after = trial.mix(part, state, paradigm=paradigm)
        expect = (whole[0][:, : part.shape[1]], whole[1] if part.shape == more.shape else None)
        what = f"{paradigm} against {trial.reference}, without gradients"
        trial.compare(what, (y, after if part.shape == more.shape else None), expect)
    beginning, _ = trial.mix(more, None)
    _without_states(trial, more, beginning)
    _documents(trial, more)
    _in_large_chunks(trial, more, state, whole)
    _gradients_of_thousands(trial, text)
    _whole_blocks(trial, text, state)
    # four thousand from nothing, with no final state wanted, as text is scored
    y, _ = trial.mix(text, None, return_state=False)
    what = f"{trial.mixer.paradigm}, the first of {length:,} tokens against {more.shape[1]:,}"
    trial.compare(what, (y[:, : more.shape[1]], None), (beginning, None))
    if stepped is not None:
        what = f"steps after {length - 2:,} tokens against {trial.mixer.paradigm}"
        trial.compare(what, (stepped, None), (y[:, -2:], None))
        _after_a_context(trial)


def _after_a_context(trial: Trial) -> None:
    """More tokens than a context usually has, at once and in pieces: where tables of positions end, and scans of chunks
    have two levels."""
    if Paradigm.CHUNKWISE not in trial.paradigms:  # others are quadratic or go token by token
        return
    text, state, outputs, mixer = trial.tokens(1, CONTEXT + HEAD), None, [], _of_few_heads(trial)
    try:
        whole, _ = trial.mix(text, None, mixer, paradigm=Paradigm.CHUNKWISE, return_state=False)
    except SeqmixError:  # the table's end is refused
        return
    for piece in text.split(BLOCKS[-1] - 1, dim=1):
        y, state = trial.mix(piece, state, mixer, paradigm=Paradigm.CHUNKWISE)
        outputs.append(y)
    what = f"chunkwise, {text.shape[1]:,} tokens at once against pieces of {BLOCKS[-1] - 1:,}"
    trial.compare(what, (whole, None), (torch.cat(outputs, dim=1), None))


def _of_few_heads(trial: Trial, dtype: torch.dtype = torch.float64) -> SequenceMixer:
    """The mixer; where its states grow, so that chunks or not it is quadratic, of one head if it may have one."""
    one = {**trial.case.options, "n_heads": 1} if trial.mixer.traits.state == "growing" else trial.case.options
    found = trial.subject.mixer(one, dtype, trial.case.layer)
    return trial.rebuilt(dtype) if found is None else found


def _as_many(trial: Trial, paradigm: Paradigm, text: Tensor, most: int = BLOCKS[-1] + HEAD) -> Tensor:
    """As many tokens as there are blocks for; but for the default, what is quadratic reads no more."""
    few = paradigm is Paradigm.PARALLEL and paradigm is not trial.mixer.paradigm
    return text[:, :most] if few else text


def _without_states(trial: Trial, text: Tensor, whole: Tensor) -> None:
    """What no final state is wanted of, in lengths that blocks divide (and transforms of as many tokens wrap) too."""
    for paradigm in trial.paradigms:
        many = _as_many(trial, paradigm, text).shape[1]
        blocks = () if paradigm is Paradigm.RECURRENT else BLOCKS if many == text.shape[1] else BLOCKS[:-1]
        for length in (many, *blocks):
            alone, _ = trial.mix(text[:, :length], None, paradigm=paradigm, return_state=False)
            what = f"{paradigm}, {alone.shape[1]:,} tokens, no final state wanted"
            trial.compare(what, (alone, None), (whole[:, :length], None))


def _documents(trial: Trial, text: Tensor) -> None:
    """Documents of a thousand tokens, and those that begin where blocks of tokens do."""
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
    # the others are quadratic or go token by token
    short = ends.clamp(max=min(length, BLOCKS[-1] + HEAD)).unique()
    for paradigm in {*trial.paradigms} - {trial.mixer.paradigm, Paradigm.RECURRENT}:
        y, _ = trial.mix(text[:, : short[-1]], None, paradigm=paradigm, cu_seqlens=short)
        trial.compare(f"{paradigm}, {what}", (y, None), (expected[:, : short[-1]], None))


def _in_large_chunks(trial: Trial, text: Tensor, state: Any, whole: tuple[Tensor, Any]) -> None:
    """What chunks of hundreds of tokens give, where there may be such, and those of the configuration."""
    if Paradigm.CHUNKWISE not in trial.paradigms:
        return
    accepts = lambda size: trial.subject.accepts({**trial.case.options, **size})  # noqa: E731
    for size in chunk_sizes(trial.subject.config, accepts, candidates=BLOCKS):
        found = trial.mix(text, state, trial.rebuilt(chunk_size=size), paradigm=Paradigm.CHUNKWISE)
        trial.compare(f"chunks of {size} on {text.shape[1]:,} tokens against {trial.reference}", found, whole)


def _gradients_of_thousands(trial: Trial, text: Tensor) -> None:
    """Chunkwise, which alone is linear in memory and in blocks: at once against two halves."""
    if Paradigm.CHUNKWISE not in trial.paradigms:
        return
    # of growing states chunks are quadratic: in float32 they take half the time
    dtype, near = (torch.float32, 1e-4) if trial.mixer.traits.state == "growing" else (trial.case.dtype, EXACT)
    text, mixer, half = text.to(dtype), _of_few_heads(trial, dtype), text.shape[1] // 2
    call = trial.call(Paradigm.CHUNKWISE, mixer)

    def in_halves(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        first, between = call(x[:, :half], state)
        second, after = call(x[:, half:], between)
        return torch.cat((first, second), dim=1), after

    what = f"chunkwise, {text.shape[1]:,} tokens at once against two halves"
    whole, halves = (trial.differentiate(each, text, None, mixer=mixer) for each in (call, in_halves))
    trial.compare(what, whole, halves, near)


def _whole_blocks(trial: Trial, text: Tensor, state: Any) -> None:
    """Segments that blocks divide, by mixers whose vectors (of gates, of decays) are moved, so that one remembers."""
    for shift in (MOVED, -MOVED) if trial.mixer.traits.has_state else ():
        mixer = trial.rebuilt()
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(shift if parameter.ndim == 1 else 0)
        start, after, y = 0, state, text[:, :0]
        for length in (length for length in BLOCKS if length + HEAD <= text.shape[1]):
            more, after = trial.mix(text[:, start:length], after, mixer, paradigm=trial.reference)
            y = torch.cat((y, more), dim=1)
            if not y.isfinite().all():  # such parameters are none
                break
            for paradigm in {*trial.paradigms} - {trial.reference}:
                z, found = trial.mix(text[:, :length], state, mixer, paradigm=paradigm)
                what = f"{paradigm}, {length} tokens against {trial.reference}, vectors moved by {shift:g}"
                trial.compare(what, (z, found), (y, after))
            start = length
        else:
            token = text[:, start : start + 1]
            y, _ = trial.decode(token, clone(after), trial.call(trial.reference, mixer))
            whole, _ = trial.mix(text[:, : start + 1], state, mixer)
            what = f"a step after {start} tokens against the whole, vectors moved by {shift:g}"
            trial.compare(what, (y, None), (whole[:, start:], None))


def _as_long_as_it_takes(trial: Trial) -> tuple[Tensor, Tensor | None]:
    """Four times a case's tokens, or as many as a table of positions has, and steps at their end, if there is a
    state."""
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
