"""The recurrent paradigm of any family: the definition, token by token, with its own backward pass.

Notation of family.py; dS_t is the gradient of the state after token t, dS_t^+ the part of it from later tokens:

    S_t = write(S_{t-1})                    o_t = scale q_t S_t
    dS_t = dS_t^+ + scale q_t^T do_t        dq_t = scale do_t S_t^T
    dS_{t-1}^+ = carry(dS_t)                the other gradients follow from S_{t-1} and dS_t

As a reference, it shares no formula with the chunkwise engine. Only the states and their gradients are computed one
after another. Outputs and the other gradients are computed for several tokens at once: as many as have states that fit
into a CPU's cache, or into a part of a GPU's memory. Every BLOCK-th state of a document is saved, except the initial
state; the backward pass recomputes the states between them, so memory grows slowly with T. One token alone, as in
decoding, is computed by plain operations.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.custom_op import Gradients, Op
from ..runtime.materialize import materialize
from ..runtime.packing import Stretch
from .family import Recurrence, RecurrenceOutput, Run, fixed_decay, split_decay
from .groups import group_elements

BLOCK = 64
"""Tokens between saved states."""
CACHED_ELEMENTS = 2**19
"""Maximum number of elements of the states that are computed at once on a CPU."""


class TokenVectors(NamedTuple):
    """Vectors of n tokens in the dtype of states, with R = B H; those of single tokens (`each`) lack the first axis."""

    q: Tensor
    """Queries times the scale, [n R 1 K]."""
    k: Tensor
    """Keys, [n R K 1]."""
    v: Tensor
    """Values, [n R 1 V]."""
    beta: Tensor | None
    """Write strengths, [n R 1 1]."""
    beta_k: Tensor
    """beta k, or k without beta, [n R K 1]."""
    a: Tensor
    """Keys that read the decayed state, [n R 1 K]; k if the call has no a."""
    b: Tensor | None
    """Keys that write back the values read with a, [n R K 1]."""
    kept: Tensor | None
    """First part of the decay (`split_decay`), [n R K 1] or [n R 1 1]; None without a decay."""
    change: Tensor | None
    """Second part of the decay, of the same shape."""

    def each(self) -> "list[TokenVectors]":
        """Split into single tokens."""
        count = len(self.q)
        return [
            TokenVectors(*x) for x in zip(*([None] * count if x is None else x.unbind(0) for x in self), strict=True)
        ]

    def part(self, start: int, stop: int) -> "TokenVectors":
        """Return the tokens start to stop - 1."""
        return TokenVectors._make(None if x is None else x[start:stop] for x in self)

    def apply_decay(self, state: Tensor) -> Tensor:
        """Multiply states with the tokens' decays."""
        if self.kept is None or self.change is None:
            return state
        return torch.addcmul(self.kept * state, self.change, state)

    def write(self, state: Tensor, column: Tensor, row: Tensor, out: Tensor) -> None:
        """Write decayed states plus the outer products of [n R K 1] and [n R 1 V] to `out`."""
        if self.kept is None or self.change is None:
            torch.addcmul(state, column, row, out=out)
        else:
            torch.mul(column, row, out=out)
            out.addcmul_(self.change, state).addcmul_(self.kept, state)


class TokenRule(ABC):
    """Update of a family's state [R K V] by one token, and its gradients; all tensors have the dtype of states."""

    @abstractmethod
    def step(self, x: Recurrence) -> tuple[Tensor, Tensor]:
        """Return output [B 1 H V] and state of one token, by plain operations, which a compiler can fuse."""

    @abstractmethod
    def write(self, token: TokenVectors, state: Tensor, out: Tensor) -> None:
        """Compute S_t from S_{t-1} and write it to `out`."""

    @abstractmethod
    def carry(self, token: TokenVectors, d_state: Tensor) -> Tensor:
        """Return dS_{t-1}^+ from dS_t."""

    @abstractmethod
    def gradients(self, x: TokenVectors, entries: Tensor, d_states: Tensor) -> Mapping[str, Tensor]:
        """Return the gradients of the family's inputs by name, from S_{t-1} and dS_t of all tokens [n R K V].

        The names are some of k, v, beta, a, b and log_decay [n R K 1].
        """


def recurrent_kernel(name: str, rule: TokenRule) -> Run:
    """Build the recurrent reference kernel of a family.

    It is an op called `name`; for a single token (decoding) it uses plain operations instead.
    """
    op = Op(
        name,
        Recurrence,
        fake=_allocate,
        forward=partial(_forward, rule),
        backward=partial(_backward, rule),
        saves=1,
    )

    def compute(x: Recurrence) -> RecurrenceOutput:
        """Compute the definition token by token; a token costs the same at every position."""
        x = x.by_head()
        output, state, *_ = rule.step(x) if x.q.shape[1] == 1 and x.cu_seqlens is None else op(x)
        return RecurrenceOutput(output, state if x.output_final_state else None)

    # errors and traces show the name of the kernel
    compute.__module__ = type(rule).__module__
    compute.__name__ = name
    compute.__qualname__ = name
    return compute


def _allocate(x: Recurrence) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate output, final state [N H K V] and saved states [blocks B H K V], which are empty if not needed."""
    # a row of several documents saves at most as many states as a row of one document
    blocks = (x.q.shape[1] - 1) // BLOCK
    saved = x.new_state(blocks, x.q.shape[0]) if x.needs_grad else x.q.new_empty(0, dtype=x.wide_dtype)
    return x.new_output(), x.new_state(x.rows).zero_(), saved


def _forward(rule: TokenRule, x: Recurrence) -> tuple[Tensor, Tensor, Tensor]:
    output, final_state, saved = _allocate(x)
    x = x.widened()
    index = 0
    size = _parallel_tokens(x)
    buffer = _new_states(x, size, 1)
    for stretch in x.stretches:
        state = _initial_state(x, stretch)
        for start, stop in _parts(stretch.start, stretch.stop, size):
            buffer[0] = state
            if x.needs_grad and start > stretch.start and (start - stretch.start) % BLOCK == 0:
                saved[index] = state.unflatten(0, saved.shape[1:3])
                index += 1
            tokens = _tokens(x, start, stop)
            states = buffer[: stop - start + 1]
            _write_states(rule, tokens.each(), states)
            _store(output, start, stop, tokens.q @ states[1:])
            state = states[-1]
        final_state[stretch.rows] = state.unflatten(0, (-1, final_state.shape[1]))
    if x.needs_grad:
        saved[index:].zero_()  # documents may use fewer rows than allocated
    return output, final_state, saved


def _backward(rule: TokenRule, x: Recurrence, gradients: Gradients) -> dict[str, Tensor]:
    (d_output, d_final_state), (saved,) = gradients.outputs, gradients.saved
    inputs = {"q": x.q, "k": x.k, "v": x.v, "beta": x.beta, "a": x.a, "b": x.b, "initial_state": x.initial_state}
    out = {name: torch.zeros_like(tensor) for name, tensor in inputs.items() if tensor is not None}
    if x.log_decay is not None:
        out["log_decay"] = torch.zeros_like(x.log_decay, dtype=x.wide_dtype)
    x = x.widened()
    d_output = torch.zeros_like(x.v) if d_output is None else d_output.to(x.wide_dtype)
    plan = [(stretch, _parts(stretch.start, stretch.stop, BLOCK)) for stretch in x.stretches]
    index = sum(max(len(blocks) - 1, 0) for _, blocks in plan)
    size = _parallel_tokens(x)
    buffer = _new_states(x, BLOCK, 1)
    d_states = _new_states(x, size, 0)
    for stretch, blocks in reversed(plan):
        d_state = torch.zeros_like(buffer[0])
        if d_final_state is not None:
            d_state = d_final_state[stretch.rows].to(x.wide_dtype).flatten(0, 1)
        for start, stop in reversed(blocks):
            if start > stretch.start:
                index -= 1
            buffer[0] = saved[index].flatten(0, 1) if start > stretch.start else _initial_state(x, stretch)
            tokens = _tokens(x, start, stop)
            d_out = _rows(d_output, start, stop)[..., None, :]
            each = tokens.each()
            states = buffer[: stop - start + 1]
            _write_states(rule, each, states)
            for first, last in reversed(_parts(0, stop - start, size)):
                for t in reversed(range(first, last)):
                    d_state = torch.addcmul(d_state, each[t].q.mT, d_out[t], out=d_states[t - first])
                    d_state = rule.carry(each[t], d_state)
                part = tokens.part(first, last)
                entries = states[first:last]
                part_gradients = {"q": x.scale * (d_out[first:last] @ states[first + 1 : last + 1].mT)}
                part_gradients |= rule.gradients(part, entries, d_states[: last - first])
                if x.a is None and "a" in part_gradients:  # the state was read with the keys
                    part_gradients["k"] = part_gradients["k"] + part_gradients.pop("a")
                for name in part_gradients.keys() & out.keys():
                    _add(out[name], start + first, start + last, part_gradients[name])
        if x.initial_state is not None:
            out["initial_state"][stretch.rows] = d_state.unflatten(0, (-1, x.state_shape[0]))
    return out


def _parallel_tokens(x: Recurrence) -> int:
    """Return the number of tokens that are computed together: a power of two, at most BLOCK."""
    fitting = group_elements(x.q.device, CACHED_ELEMENTS) // max(x.q.shape[0] * math.prod(x.state_shape), 1)
    return 1 << min(max(fitting, 1).bit_length() - 1, BLOCK.bit_length() - 1)


def _new_states(x: Recurrence, tokens: int, extra: int) -> Tensor:
    """Allocate states for `tokens` tokens (at most all of the call) and `extra` more, [n R K V]."""
    return x.new_state(min(tokens, x.q.shape[1]) + extra, x.q.shape[0]).flatten(1, 2)


def _parts(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Split a range into parts of `size`; the last part may be shorter."""
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


def _initial_state(x: Recurrence, stretch: Stretch) -> Tensor:
    """Return the state before a stretch, [R K V]."""
    if x.initial_state is None:
        return x.new_state(stretch.rows.stop - stretch.rows.start).zero_().flatten(0, 1)
    return x.initial_state[stretch.rows].flatten(0, 1)


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Return tokens start to stop - 1 of x [B T H *] as rows, [n R *]."""
    return x[:, start:stop].transpose(0, 1).flatten(1, 2)


def _tokens(x: Recurrence, start: int, stop: int) -> TokenVectors:
    q, k, v = (_rows(tensor, start, stop) for tensor in (x.q, x.k, x.v))
    a, b, beta = (None if tensor is None else _rows(tensor, start, stop) for tensor in (x.a, x.b, x.beta))
    rate = None if beta is None else beta[..., None, None]
    column = k[..., None]
    log_decay = x.log_decay
    kept, change = None, None
    if log_decay is not None:
        is_fixed = log_decay.ndim == 1
        log_decay = log_decay.repeat(x.q.shape[0])[None] if is_fixed else _rows(log_decay, start, stop)
        log_decay = log_decay[(...,) + (None,) * (4 - log_decay.ndim)]
        kept, change = split_decay(log_decay).expand(-1, stop - start, -1, -1, -1).unbind(0)
    return TokenVectors(
        q=(x.scale * q)[..., None, :],
        k=column,
        v=v[..., None, :],
        beta=rate,
        beta_k=column if rate is None else rate * column,
        a=(k if a is None else a)[..., None, :],
        b=None if b is None else b[..., None],
        kept=kept,
        change=change,
    )


def _write_states(rule: TokenRule, tokens: list[TokenVectors], states: Tensor) -> None:
    """Compute the state after each token, starting from states[0], and write it to states[1:]."""
    each = states.unbind(0)
    for token, before, after in zip(tokens, each[:-1], each[1:], strict=True):
        rule.write(token, before, after)


def _store(out: Tensor, start: int, stop: int, rows: Tensor) -> None:
    """Write rows [n R * *], which hold one vector each, to their tokens in out [B T H *]."""
    out[:, start:stop] = rows.reshape(stop - start, *out.shape[:1], *out.shape[2:]).transpose(0, 1)


def _add(out: Tensor, start: int, stop: int, gradient: Tensor) -> None:
    """Write a block's gradient [n R * *] to its tokens in out [B T H *], or add its sum over all tokens to out [H].

    If out has one number per head, the gradient is summed over the last dimensions.
    """
    if out.ndim == 1:
        out += gradient.sum((0, 2, 3)).view(-1, len(out)).sum(0)
    else:
        _store(out, start, stop, gradient if out.ndim == 4 else gradient.sum((2, 3)))


# ---- one token

_NULL_CONTEXT = nullcontext()


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context without autocast; no effect if autocast is off already, or on the meta device, which autocast rejects."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else _NULL_CONTEXT


def token_decay(x: Recurrence) -> tuple[Tensor, Tensor] | None:
    """Return the `split_decay` of a single token as factors of states, [1|B H 1|K 1] each; None without a decay."""
    if x.log_decay is None:
        return None
    if x.log_decay.ndim > 1:
        log_decay = x.log_decay[:, 0].to(x.wide_dtype)
        factors = split_decay(log_decay[(...,) + (None,) * (4 - log_decay.ndim)])
    else:
        factors = fixed_decay(x.log_decay, x.wide_dtype) if x.decay is None else x.decay
    kept, change = factors.unbind(0)
    return materialize(kept, 1), materialize(change, 1)


def decayed_state(state: Tensor, decay: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return a state times the decay of `token_decay`."""
    return state if decay is None else torch.addcmul(decay[0] * state, decay[1], state)


def write_token(x: Recurrence, decay: tuple[Tensor, Tensor] | None, *outers: tuple[Tensor, Tensor]) -> Tensor:
    """Return the state after a single token: the decayed initial state plus outer products [B H K 1] [B H 1 V].

    A donated state is overwritten.
    """
    state = x.initial_state
    writable = False
    if state is not None:
        writable = x.output_final_state and x.donated and state.dtype == x.wide_dtype and state.is_contiguous()
        state = state.to(x.wide_dtype)
    if state is None or decay is None:
        return _add_outers(state, writable, outers)
    kept, change = decay
    if writable:  # a compiler writes a state in its place only if it reads few tensors: the factor is rounded here
        return _add_outers(state.mul_(materialize(kept + change, 1)), writable, outers)
    return torch.addcmul(torch.addcmul(_add_outers(None, False, outers), change, state), kept, state)


def _add_outers(state: Tensor | None, writable: bool, outers: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return a state, None for zero, plus outer products; in place if it is writable.

    Fused operations save passes over the state.
    """
    for column, row in outers:
        if state is None:
            state = column * row
        elif writable:
            state.addcmul_(column, row)
        else:
            state = torch.addcmul(state, column, row)
    assert state is not None
    return state
