"""The recurrent paradigm of any family for more than one token: the definition, token by token, with its own backward.

Notation of recurrence.py, and dS_t the gradient of the state after token t, dS_t^+ what of it comes from later tokens:

    S_t = write(S_{t-1})                    o_t = scale q_t S_t
    dS_t = dS_t^+ + scale q_t^T do_t        dq_t = scale do_t S_t^T
    dS_{t-1}^+ and the other gradients = write_backward(dS_t)

It is a reference: it shares no formula with the chunkwise engine. Every BLOCK-th state of a document is saved but the
first, which is given; the backward pass recomputes the states between, so memory grows slowly with T.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .autograd import Gradients, Op
from .donation import may_overwrite
from .materialize import materialize
from .once import once
from .packing import Stretch
from .recurrence import Recurrence, RecurrenceOutput, Run

BLOCK = 64
"""Tokens between saved states."""


class TokenRule(ABC):
    """What a family's state becomes at one token, [B H K V]; what is written is given wide."""

    @abstractmethod
    def step(self, x: Recurrence) -> tuple[Tensor, Tensor]:
        """Output [B 1 H V] and state of one token, in plain operations, which a compiler fuses."""

    @abstractmethod
    def write(self, x: Recurrence, t: int, state: Tensor) -> Tensor:
        """S_t of S_{t-1}."""

    @abstractmethod
    def write_backward(
        self, x: Recurrence, t: int, state: Tensor, d_state: Tensor, out: Mapping[str, Tensor]
    ) -> Tensor:
        """What token t owes S_{t-1}; fills or adds its gradients of k, v, beta, a, b and log_decay.

        Args:
            x: the call.
            t: the token.
            state: S_{t-1}.
            d_state: dS_t.
            out: gradients of inputs by name, of the inputs' shapes; that of log_decay wide.
        """


def recurrent_kernel(name: str, rule: TokenRule) -> Run:
    """The reference kernel of a family: an op `name`, and plain operations for one token, which is decoding."""
    op = Op(
        name,
        Recurrence,
        fake=_allocate,
        forward=lambda x: _forward(x, rule),
        backward=lambda x, gradients: _backward(x, gradients, rule),
        saves=1,
    )

    def compute(x: Recurrence) -> RecurrenceOutput:
        """Token by token, by the definition; one token costs the same at every position."""
        x = x.by_head()
        output, state, *_ = rule.step(x) if x.q.shape[1] == 1 and x.cu_seqlens is None else op(x)
        return RecurrenceOutput(output, state if x.output_final_state else None)

    # errors and traces name the family's kernel
    compute.__module__, compute.__name__, compute.__qualname__ = type(rule).__module__, name, name
    return compute


def _allocate(x: Recurrence) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state [N H K V] and the saved states [blocks B H K V], which are empty unless wanted."""
    blocks = (x.q.shape[1] - 1) // BLOCK  # documents have no more of them than they would have as one
    saved = x.new_state(blocks, x.q.shape[0]) if x.needs_grad else x.q.new_empty(0, dtype=x.wide)
    return x.new_output(), x.new_state(x.rows).zero_(), saved


def _forward(x: Recurrence, rule: TokenRule) -> tuple[Tensor, Tensor, Tensor]:
    output, final_state, saved = _allocate(x)
    x, index = x.widened(), 0
    query = x.scale * x.q
    for stretch in x.stretches:
        state = final_state[stretch.rows]
        if x.initial_state is not None:
            state = x.initial_state[stretch.rows]
        for start, stop in _blocks(stretch):
            if x.needs_grad and start > stretch.start:
                saved[index] = state
                index += 1
            for t in range(start, stop):
                state = rule.write(x, t, state)
                output[:, t] = read(query[:, t], state)
        final_state[stretch.rows] = state
    if x.needs_grad:
        saved[index:].zero_()  # documents may leave rows over
    return output, final_state, saved


def _backward(x: Recurrence, gradients: Gradients, rule: TokenRule) -> dict[str, Tensor]:
    (d_output, d_final_state), (saved,) = gradients.outputs, gradients.saved
    given = {"q": x.q, "k": x.k, "v": x.v, "beta": x.beta, "a": x.a, "b": x.b, "initial_state": x.initial_state}
    out = {name: torch.zeros_like(tensor) for name, tensor in given.items() if tensor is not None}
    if x.log_decay is not None:
        out["log_decay"] = torch.zeros_like(x.log_decay, dtype=x.wide)
    x = x.widened()
    query, d_output = x.scale * x.q, torch.zeros_like(x.v) if d_output is None else d_output.to(x.wide)
    runs = [(stretch, _blocks(stretch)) for stretch in x.stretches]
    index = sum(max(len(blocks) - 1, 0) for _, blocks in runs)
    for stretch, blocks in reversed(runs):
        d_state = x.new_state(x.q.shape[0] if x.cu_seqlens is None else 1).zero_()
        if d_final_state is not None:
            d_state = d_final_state[stretch.rows].to(x.wide)
        for start, stop in reversed(blocks):
            if start > stretch.start:
                index -= 1
                states = [saved[index]]
            elif x.initial_state is None:
                states = [torch.zeros_like(d_state)]
            else:
                states = [x.initial_state[stretch.rows]]
            for t in range(start, stop):
                states.append(rule.write(x, t, states[-1]))
            for t in range(stop - 1, start - 1, -1):
                d_out = d_output[:, t]
                d_state = d_state + outer(query[:, t], d_out)
                out["q"][:, t] = x.scale * torch.einsum("bhv,bhkv->bhk", d_out, states[t + 1 - start])
                d_state = rule.write_backward(x, t, states[t - start], d_state, out)
        if x.initial_state is not None:
            out["initial_state"][stretch.rows] = d_state
    return out


def _blocks(stretch: Stretch) -> list[tuple[int, int]]:
    """A stretch in blocks of BLOCK tokens, the last one ragged."""
    return [(at, min(at + BLOCK, stretch.stop)) for at in range(stretch.start, stretch.stop, BLOCK)]


# ---- one token

_NOTHING = nullcontext()


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, where it is on; it does not know the meta device."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else _NOTHING


def entry_of(x: Recurrence) -> tuple[Tensor | None, bool]:
    """exp(a) S before the one token, and whether that may be written: a donated state has decayed in its own place."""
    state, wide = x.initial_state, x.wide
    if state is None:
        return None, False
    own = x.output_final_state and may_overwrite() and state.dtype == wide and state.is_contiguous()
    state, decay = state.to(wide), decay_at(x.log_decay, 0, wide)
    if isinstance(decay, Tensor):
        decay = materialize(decay, 1)
        state = state.mul_(decay) if own else state * decay
    return state, own


def add_outer(state: Tensor, own: bool, column: Tensor, row: Tensor) -> Tensor:
    """S plus the product of [B H K 1] and [B H 1 V]; one pass over the state less than a product and a sum."""
    return state.addcmul_(column, row) if own else torch.addcmul(state, column, row)


def decay_at(log_decay: Tensor | None, token: int, dtype: torch.dtype) -> Tensor | float:
    """exp(a) of one token, broadcasting over the state [B H K V]."""
    if log_decay is None:
        return 1.0
    if log_decay.ndim == 1:
        return once(_fixed_decay, log_decay, dtype)
    a = log_decay[:, token]  # [B H] or [B H K]
    return a.to(dtype).exp()[(...,) + (None,) * (4 - a.ndim)]


def _fixed_decay(log_decay: Tensor, dtype: torch.dtype) -> Tensor:
    return log_decay.to(dtype).exp()[None, :, None, None]


def add_decay_gradient(out: Mapping[str, Tensor], t: int, per_key: Tensor) -> None:
    """Add da_t [B H K], per key dimension, to the gradient of a log-decay of any shape."""
    if "log_decay" not in out:
        return
    d_log_decay = out["log_decay"]
    if d_log_decay.ndim == 1:
        d_log_decay += per_key.sum((0, 2))
    else:
        d_log_decay[:, t] = per_key if d_log_decay.ndim == 4 else per_key.sum(2)


def read(x: Tensor, state: Tensor) -> Tensor:
    """x^T S of one token: [B H K], [B H K V] -> [B H V]."""
    # where K is 1, einsum would multiply element by element, which counters of products do not see
    return (x[..., None, :] @ state).squeeze(-2)


def outer(x: Tensor, y: Tensor) -> Tensor:
    """[B H K], [B H V] -> [B H K V]."""
    return x[..., :, None] * y[..., None, :]
