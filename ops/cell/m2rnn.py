"""The cell of M2RNN: a matrix state per head that goes through a nonlinearity at every token.

    A_t = tanh(S_{t-1} W + k_t v_t^T)                W [V V] per head
    S_t = e^{g_t} S_{t-1} + (1 - e^{g_t}) A_t        g: log-decay
    o_t = q_t S_t

The states of all tokens would be K times as large as the values. The forward pass saves those before every chunk of
tokens; from these, the backward pass recomputes the states within a chunk.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..recurrence.groups import capacity
from ..runtime.custom_op import Gradients, Op
from ..runtime.kernel import Probe
from ..runtime.packing import Stretch, stretches


class M2RNN(NamedTuple):
    """Inputs of `m2rnn`."""

    q: Tensor
    """Queries, [B T H K]."""
    k: Tensor
    """Keys, [B T H K]."""
    v: Tensor
    """Values, [B T H V]."""
    log_decay: Tensor
    """Natural log of the decays, <= 0, [B T H]."""
    weight: Tensor
    """Matrices W, [H V V]."""
    initial_state: Tensor | None
    """Initial states, [N H K V]; None means zeros."""
    cu_seqlens: Tensor | None
    """Boundaries of packed documents, [N+1]; None if the batch is not packed."""
    boundaries: Sequence[int] | None
    """Values of cu_seqlens; None where they are not known on the host."""
    chunk_size: int
    """Tokens between the states that are saved for the backward pass."""
    output_final_state: bool
    """True if the final state is requested."""
    needs_grad: bool = False
    """True if a backward pass may follow; set by the op."""

    @property
    def wide_dtype(self) -> torch.dtype:
        """Dtype of states and sums: float32, or float64 for float64 inputs."""
        return torch.promote_types(self.v.dtype, torch.float32)

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Shape (N, H, K, V) of all states."""
        rows = self.v.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        return rows, self.v.shape[2], self.k.shape[3], self.v.shape[3]

    def probe(self) -> Probe:
        """Return the properties of this call that a kernel must support."""
        _, _, keys, values = self.state_shape
        device, dtype = self.v.device, self.v.dtype
        return Probe(device=device, dtype=dtype, key_width=keys, value_width=values, log_decay="B T H")

    @property
    def stretches(self) -> list[Stretch]:
        """Ranges of tokens that are processed as one sequence each."""
        return stretches(self.v.shape[0], self.v.shape[1], self.cu_seqlens, self.boundaries)


def _allocate(x: M2RNN) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the output, the final state, and the states before every chunk, heads first."""
    rows, *state = x.state_shape
    output = x.v.new_empty(x.v.shape, dtype=x.wide_dtype)
    final = x.v.new_empty((rows, *state) if x.output_final_state else (0,), dtype=x.wide_dtype)
    if not x.needs_grad:
        return output, final, x.v.new_empty(0, dtype=x.wide_dtype)
    chunks = capacity(x.v.shape[1], x.chunk_size, x.cu_seqlens)
    # zeros: documents may use fewer chunks than are allocated, and an op's outputs must be defined everywhere
    return output, final, x.v.new_zeros(chunks, state[0], x.v.shape[0], *state[1:], dtype=x.wide_dtype)


def _token(x: Tensor, t: int, dtype: torch.dtype) -> Tensor:
    """Return a token of x [B T H ..], heads first, [H B ..]."""
    return x[:, t].to(dtype).transpose(0, 1)


def _candidate(x: M2RNN, t: int, state: Tensor, weight: Tensor) -> Tensor:
    """Return A_t = tanh(S W + k v^T), [H B K V]."""
    k, v = (_token(y, t, state.dtype) for y in (x.k, x.v))
    written = k[..., None] * v[..., None, :]
    return torch.baddbmm(written.flatten(1, 2), state.flatten(1, 2), weight).view_as(state).tanh()


def _change(x: M2RNN, t: int, dtype: torch.dtype) -> Tensor:
    """Return the share of the new state, 1 - exp(g), [H B 1 1]."""
    return -torch.expm1(_token(x.log_decay, t, dtype))[..., None, None]


def _forward(x: M2RNN) -> tuple[Tensor, Tensor, Tensor]:
    output, final, entries = _allocate(x)
    rows, heads, *matrix = x.state_shape
    wide = x.wide_dtype
    weight = x.weight.to(wide)
    chunk = 0
    for states, start, stop in x.stretches:
        if x.initial_state is None:
            state = x.v.new_zeros(heads, len(range(rows)[states]), *matrix, dtype=wide)
        else:
            state = x.initial_state[states].to(wide).transpose(0, 1).contiguous()
        for t in range(start, stop):
            if x.needs_grad and (t - start) % x.chunk_size == 0:
                entries[chunk] = state
                chunk += 1
            state = torch.lerp(state, _candidate(x, t, state, weight), _change(x, t, wide))
            output[:, t] = (_token(x.q, t, wide)[..., None, :] @ state)[..., 0, :].transpose(0, 1)
        if x.output_final_state:
            final[states] = state.transpose(0, 1)
    return output, final, entries


def _backward(x: M2RNN, gradients: Gradients) -> dict[str, Tensor]:
    (d_output, d_final), (entries,) = gradients.outputs, gradients.saved
    wide = x.wide_dtype
    weight = x.weight.to(wide)
    out = {name: torch.zeros_like(getattr(x, name), dtype=wide) for name in ("q", "k", "v", "log_decay", "weight")}
    d_initial = x.v.new_empty(x.state_shape, dtype=wide)
    chunks = [
        (states, first, min(first + x.chunk_size, stop), first == start)
        for states, start, stop in x.stretches
        for first in range(start, stop, x.chunk_size)
    ]
    for states, start, stop in x.stretches:
        if start == stop:  # an empty document: its final state is its initial state
            d_initial[states] = 0 if d_final is None else d_final[states].to(wide)
    d_state = entries.new_empty(0)
    is_last = True
    for number, (states, start, stop, is_first) in reversed(list(enumerate(chunks))):
        if is_last:
            like = entries[number]
            d_state = torch.zeros_like(like) if d_final is None else d_final[states].to(wide).transpose(0, 1)
        before, candidates = [entries[number]], []
        for t in range(start, stop):
            candidates.append(_candidate(x, t, before[-1], weight))
            before.append(torch.lerp(before[-1], candidates[-1], _change(x, t, wide)))
        for t in reversed(range(start, stop)):
            old, candidate, state = before[t - start], candidates[t - start], before[t - start + 1]
            q, k, v = (_token(y, t, wide) for y in (x.q, x.k, x.v))
            if d_output is not None:
                d_o = _token(d_output, t, wide)[..., None, :]
                out["q"][:, t] = (state * d_o).sum(-1).transpose(0, 1)
                d_state = d_state + q[..., None] * d_o
            change = _change(x, t, wide)
            d_product = d_state * change * (1 - candidate.square())
            decay = 1 - change
            out["log_decay"][:, t] = (d_state * decay * (old - candidate)).sum((-2, -1)).transpose(0, 1)
            out["k"][:, t] = (d_product * v[..., None, :]).sum(-1).transpose(0, 1)
            out["v"][:, t] = (d_product * k[..., None]).sum(-2).transpose(0, 1)
            out["weight"] += old.flatten(1, 2).mT @ d_product.flatten(1, 2)
            d_state = decay * d_state + (d_product.flatten(1, 2) @ weight.mT).view_as(d_state)
        if is_first:
            d_initial[states] = d_state.transpose(0, 1)
        is_last = is_first  # of the sequence before
    return out | {"initial_state": d_initial}


M2RNN_OP = Op("m2rnn", M2RNN, fake=_allocate, forward=_forward, backward=_backward, saves=1)


def m2rnn_recurrent(x: M2RNN) -> tuple[Tensor, Tensor | None]:
    """Compute the cell token by token: the definition."""
    output, final, _ = M2RNN_OP(x)
    return output.to(x.v.dtype), final if x.output_final_state else None
