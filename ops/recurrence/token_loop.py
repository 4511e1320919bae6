"""The recurrent paradigm of any family for more than one token: the definition, token by token, with its own backward.

Notation of family.py, and dS_t the gradient of the state after token t, dS_t^+ what of it comes from later tokens:

    S_t = write(S_{t-1})                    o_t = scale q_t S_t
    dS_t = dS_t^+ + scale q_t^T do_t        dq_t = scale do_t S_t^T
    dS_{t-1}^+ = carry(dS_t)                the other gradients of S_{t-1} and dS_t

It is a reference: it shares no formula with the chunkwise engine. Only states wait for each other: what is read of
them, and gradients but theirs, are formed for as many tokens at once as have states that fit a CPU's cache, or a part
of a GPU's memory. Every BLOCK-th state of a document is saved but the first, which is given; the backward pass
recomputes the states between, so memory grows slowly with T.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.custom_op import Gradients, Op
from ..runtime.materialize import materialize
from ..runtime.packing import Stretch
from .family import Recurrence, RecurrenceOutput, Run, fixed_decay
from .groups import group_elements

BLOCK = 64
"""Tokens between saved states."""
CACHED = 2**19
"""Elements of the states of tokens that are computed at once, at most, on a CPU."""


class TokenVectors(NamedTuple):
    """Some n tokens, in the dtype of states, and R = B H; those of `each` lack the first axis."""

    q: Tensor
    """With the scale, [n R 1 K]."""
    k: Tensor
    """[n R K 1]."""
    v: Tensor
    """[n R 1 V]."""
    beta: Tensor | None
    """[n R 1 1]."""
    written: Tensor
    """beta k, [n R K 1]."""
    a: Tensor
    """[n R 1 K]; k where none is given."""
    b: Tensor | None
    """[n R K 1]."""
    decay: Tensor | None
    """exp(log_decay), [n R K 1] or [n R 1 1]."""

    def each(self) -> "list[TokenVectors]":
        """One by one."""
        count = len(self.q)
        return [
            TokenVectors(*x) for x in zip(*([None] * count if x is None else x.unbind(0) for x in self), strict=True)
        ]

    def part(self, start: int, stop: int) -> "TokenVectors":
        """Some of them."""
        return TokenVectors._make(None if x is None else x[start:stop] for x in self)

    def decayed(self, state: Tensor) -> Tensor:
        """What is left of states before the tokens."""
        return state if self.decay is None else self.decay * state


class TokenRule(ABC):
    """What a family's state becomes at one token, [R K V]; what is written is given wide."""

    @abstractmethod
    def step(self, x: Recurrence) -> tuple[Tensor, Tensor]:
        """Output [B 1 H V] and state of one token, in plain operations, which a compiler fuses."""

    @abstractmethod
    def write(self, token: TokenVectors, state: Tensor, out: Tensor) -> None:
        """S_t of S_{t-1}, to its place."""

    @abstractmethod
    def carry(self, token: TokenVectors, d_state: Tensor) -> Tensor:
        """dS_{t-1}^+ of dS_t."""

    @abstractmethod
    def gradients(self, x: TokenVectors, entries: Tensor, d_states: Tensor) -> Mapping[str, Tensor]:
        """Of S_{t-1} and dS_t of all tokens [n R K V], the gradients of k, v, beta, a and b, and of log_decay
        [n R K 1]: those that the family has."""


def recurrent_kernel(name: str, rule: TokenRule) -> Run:
    """The reference kernel of a family: an op `name`, and plain operations for one token, which is decoding."""
    op = Op(
        name,
        Recurrence,
        fake=_allocate,
        forward=partial(_forward, rule),
        backward=partial(_backward, rule),
        saves=1,
    )

    def compute(x: Recurrence) -> RecurrenceOutput:
        """Token by token, by the definition; one token costs the same at every position."""
        x = x.by_head()
        output, state, *_ = rule.step(x) if x.q.shape[1] == 1 and x.cu_seqlens is None else op(x)
        return RecurrenceOutput(output, state if x.output_final_state else None)

    # errors and traces name the family's kernel
    compute.__module__ = type(rule).__module__
    compute.__name__ = name
    compute.__qualname__ = name
    return compute


def _allocate(x: Recurrence) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state [N H K V] and the saved states [blocks B H K V], which are empty unless wanted."""
    blocks = (x.q.shape[1] - 1) // BLOCK  # documents have no more of them than they would have as one
    saved = x.new_state(blocks, x.q.shape[0]) if x.needs_grad else x.q.new_empty(0, dtype=x.wide)
    return x.new_output(), x.new_state(x.rows).zero_(), saved


def _forward(rule: TokenRule, x: Recurrence) -> tuple[Tensor, Tensor, Tensor]:
    output, final_state, saved = _allocate(x)
    x, index, size = x.widened(), 0, _at_once(x)
    room = _room(x, size, 1)
    for stretch in x.stretches:
        state = _initial(x, stretch)
        for start, stop in _parts(stretch.start, stretch.stop, size):
            room[0] = state
            if x.needs_grad and start > stretch.start and (start - stretch.start) % BLOCK == 0:
                saved[index] = state.unflatten(0, saved.shape[1:3])
                index += 1
            tokens = _tokens(x, start, stop)
            states = room[: stop - start + 1]
            _write(rule, tokens.each(), states)
            _store(output, start, stop, tokens.q @ states[1:])
            state = states[-1]
        final_state[stretch.rows] = state.unflatten(0, (-1, final_state.shape[1]))
    if x.needs_grad:
        saved[index:].zero_()  # documents may leave rows over
    return output, final_state, saved


def _backward(rule: TokenRule, x: Recurrence, gradients: Gradients) -> dict[str, Tensor]:
    (d_output, d_final_state), (saved,) = gradients.outputs, gradients.saved
    given = {"q": x.q, "k": x.k, "v": x.v, "beta": x.beta, "a": x.a, "b": x.b, "initial_state": x.initial_state}
    out = {name: torch.zeros_like(tensor) for name, tensor in given.items() if tensor is not None}
    if x.log_decay is not None:
        out["log_decay"] = torch.zeros_like(x.log_decay, dtype=x.wide)
    x = x.widened()
    d_output = torch.zeros_like(x.v) if d_output is None else d_output.to(x.wide)
    runs = [(stretch, _parts(stretch.start, stretch.stop, BLOCK)) for stretch in x.stretches]
    index = sum(max(len(blocks) - 1, 0) for _, blocks in runs)
    size = _at_once(x)
    room = _room(x, BLOCK, 1)
    d_states = _room(x, size, 0)
    for stretch, blocks in reversed(runs):
        d_state = torch.zeros_like(room[0])
        if d_final_state is not None:
            d_state = d_final_state[stretch.rows].to(x.wide).flatten(0, 1)
        for start, stop in reversed(blocks):
            if start > stretch.start:
                index -= 1
            room[0] = saved[index].flatten(0, 1) if start > stretch.start else _initial(x, stretch)
            tokens = _tokens(x, start, stop)
            d_out = _rows(d_output, start, stop)[..., None, :]
            each = tokens.each()
            states = room[: stop - start + 1]
            _write(rule, each, states)
            for first, last in reversed(_parts(0, stop - start, size)):
                for t in reversed(range(first, last)):
                    d_state = torch.addcmul(d_state, each[t].q.mT, d_out[t], out=d_states[t - first])
                    d_state = rule.carry(each[t], d_state)
                part = tokens.part(first, last)
                entries = states[first:last]
                found = {"q": x.scale * (d_out[first:last] @ states[first + 1 : last + 1].mT)}
                found |= rule.gradients(part, entries, d_states[: last - first])
                if x.a is None and "a" in found:  # the keys read
                    found["k"] = found["k"] + found.pop("a")
                for name in found.keys() & out.keys():
                    _add(out[name], start + first, start + last, found[name])
        if x.initial_state is not None:
            out["initial_state"][stretch.rows] = d_state.unflatten(0, (-1, x.matrix[0]))
    return out


def _at_once(x: Recurrence) -> int:
    """Tokens whose states are computed at once: a power of two, as BLOCK is."""
    fitting = group_elements(x.q.device, CACHED) // max(x.q.shape[0] * math.prod(x.matrix), 1)
    return 1 << min(max(fitting, 1).bit_length() - 1, BLOCK.bit_length() - 1)


def _room(x: Recurrence, tokens: int, more: int) -> Tensor:
    """For the states of so many tokens, or of all, and for more, [n R K V]."""
    return x.new_state(min(tokens, x.q.shape[1]) + more, x.q.shape[0]).flatten(1, 2)


def _parts(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """A range in parts of a size, the last one ragged."""
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


def _initial(x: Recurrence, stretch: Stretch) -> Tensor:
    """The state before a stretch, [R K V]."""
    if x.initial_state is None:
        return x.new_state(stretch.rows.stop - stretch.rows.start).zero_().flatten(0, 1)
    return x.initial_state[stretch.rows].flatten(0, 1)


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Tokens of [B T H *] as rows, [n R *]."""
    return x[:, start:stop].transpose(0, 1).flatten(1, 2)


def _tokens(x: Recurrence, start: int, stop: int) -> TokenVectors:
    q, k, v = (_rows(tensor, start, stop) for tensor in (x.q, x.k, x.v))
    a, b, beta = (None if tensor is None else _rows(tensor, start, stop) for tensor in (x.a, x.b, x.beta))
    rate = None if beta is None else beta[..., None, None]
    column = k[..., None]
    decay = x.log_decay
    if decay is not None:
        fixed = decay.ndim == 1
        decay = (decay.repeat(x.q.shape[0]).expand(stop - start, -1) if fixed else _rows(decay, start, stop)).exp()
        decay = decay[(...,) + (None,) * (4 - decay.ndim)]
    return TokenVectors(
        *((x.scale * q)[..., None, :], column, v[..., None, :], rate, column if rate is None else rate * column),
        *((k if a is None else a)[..., None, :], None if b is None else b[..., None], decay),
    )


def _write(rule: TokenRule, tokens: list[TokenVectors], states: Tensor) -> None:
    """The states after each token, after the one before them."""
    each = states.unbind(0)
    for token, before, after in zip(tokens, each[:-1], each[1:], strict=True):
        rule.write(token, before, after)


def _store(out: Tensor, start: int, stop: int, rows: Tensor) -> None:
    """Rows [n R * *] of one vector each to where their tokens are in [B T H *]."""
    out[:, start:stop] = rows.reshape(stop - start, *out.shape[:1], *out.shape[2:]).transpose(0, 1)


def _add(out: Tensor, start: int, stop: int, gradient: Tensor) -> None:
    """A block's gradient [n R * *] to where it belongs: its tokens in [B T H *], or the sum over all tokens in [H]; of
    a head's one number, of all its key dimensions."""
    if out.ndim == 1:
        out += gradient.sum((0, 2, 3)).view(-1, len(out)).sum(0)
    else:
        _store(out, start, stop, gradient if out.ndim == 4 else gradient.sum((2, 3)))


# ---- one token

_NOTHING = nullcontext()


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, where it is on; it does not know the meta device."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else _NOTHING


def entry_of(x: Recurrence) -> tuple[Tensor | None, bool]:
    """exp(a) S before the one token, and whether that may be written: a donated state has decayed in its own place."""
    state = x.initial_state
    wide = x.wide
    if state is None:
        return None, False
    own = x.output_final_state and x.donated and state.dtype == wide and state.is_contiguous()
    state = state.to(wide)
    if x.log_decay is not None:
        decay = materialize(_decay_of(x), 1)
        state = state.mul_(decay) if own else state * decay
    return state, own


def _decay_of(x: Recurrence) -> Tensor:
    """exp(log_decay) of the one token, as a factor of states: [1|B H 1|K 1]."""
    assert x.log_decay is not None
    if x.log_decay.ndim == 1:
        return fixed_decay(x.log_decay, x.wide) if x.decay is None else x.decay
    a = x.log_decay[:, 0].to(x.wide)
    return a.exp()[(...,) + (None,) * (4 - a.ndim)]


def add_outer(state: Tensor, own: bool, column: Tensor, row: Tensor) -> Tensor:
    """S plus the product of [B H K 1] and [B H 1 V]; one pass over the state less than a product and a sum."""
    return state.addcmul_(column, row) if own else torch.addcmul(state, column, row)
