"""The decay family's recurrent op for more than one token: the definition, token by token, with its own backward.

Backward in time, with dS_t the gradient of the state behind token t (notation of decay.py):

    dS_t = exp(a_{t+1}) dS_{t+1} + scale q_t^T do_t      dq_t = scale do_t S_t^T    dk_t = dS_t v_t    dv_t = k_t dS_t
    da_t = <exp(a_t) S_{t-1}, dS_t>_V                    per key dimension; summed over K, and over t, as log_decay is

It is a reference: it shares no formula with the chunkwise op. Every BLOCK-th state is kept; the backward recomputes
the states between, so memory grows slowly with T.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef  # torch.library does not export what its decorator returns

from ..materialize import once
from ..packing import pieces, stretches

BLOCK = 64
"""Tokens between kept states."""


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, where it is on; it does not know the meta device."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def decay_at(log_decay: Tensor | None, token: int, dtype: torch.dtype) -> Tensor | float:
    """exp(a) of one token, broadcasting over the state [B H K V]."""
    if log_decay is None:
        return 1.0
    a = log_decay[None] if log_decay.ndim == 1 else log_decay[:, token]  # [B|1 H] or [B H K]
    return a.to(dtype).exp()[(...,) + (None,) * (4 - a.ndim)]


def outer(x: Tensor, y: Tensor) -> Tensor:
    """[B H K], [B H V] -> [B H K V]."""
    return x[..., :, None] * y[..., None, :]


@torch.library.custom_op("seqmix::decay_recurrent", mutates_args=())
def recurrent_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state [N H K V] and the kept states [blocks B H K V] (empty unless wanted)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    output, final_state, kept = _allocate(q, k, v, log_decay, initial_state, cu_seqlens, scale, save_states)
    index = 0
    with torch.autocast(q.device.type, enabled=False):
        for stretch in stretches(q.shape[0], q.shape[1], cu_seqlens):
            state = final_state[stretch.rows]
            if initial_state is not None:
                state = initial_state[stretch.rows].to(wide)
            for start, stop in pieces(stretch, BLOCK):
                if save_states:
                    kept[index] = state
                    index += 1
                for t in range(start, stop):
                    state = _next_state(state, k, v, log_decay, t)
                    output[:, t] = scale * torch.einsum("bhk,bhkv->bhv", q[:, t].to(wide), state)
            final_state[stretch.rows] = state
    if save_states:
        kept[index:].zero_()  # documents that end in one block leave rows over
    return output, final_state, kept


def _next_state(state: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, t: int) -> Tensor:
    return decay_at(log_decay, t, state.dtype) * state + outer(k[:, t].to(state.dtype), v[:, t].to(state.dtype))


@recurrent_op.register_fake
def _allocate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, key_width = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    blocks = -(-length // BLOCK) + documents
    state = (heads, key_width, v.shape[3])
    kept = q.new_empty((blocks, batch, *state) if save_states else (0,), dtype=wide)
    return q.new_empty(v.shape), q.new_zeros((documents or batch, *state), dtype=wide), kept


@torch.library.custom_op("seqmix::decay_recurrent_backward", mutates_args=())
def recurrent_backward_op(
    d_output: Tensor,
    d_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, d log_decay and d initial state; the last two are empty where the input is None."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv, d_log_decay, d_initial = _allocate_backward(
        d_output, d_final_state, q, k, v, log_decay, initial_state, cu_seqlens, kept, scale
    )
    d_log = torch.zeros_like(d_log_decay, dtype=wide)
    with torch.autocast(q.device.type, enabled=False):
        runs = [(stretch, pieces(stretch, BLOCK)) for stretch in stretches(q.shape[0], q.shape[1], cu_seqlens)]
        index = sum(len(cuts) for _, cuts in runs)
        for stretch, cuts in reversed(runs):
            rows = q.shape[0] if cu_seqlens is None else 1
            d_state = kept.new_zeros(rows, *kept.shape[2:])
            if d_final_state is not None:
                d_state = d_final_state[stretch.rows].to(wide)
            for start, stop in reversed(cuts):
                index -= 1
                states = [kept[index]]
                for t in range(start, stop):
                    states.append(_next_state(states[-1], k, v, log_decay, t))
                for t in range(stop - 1, start - 1, -1):
                    query, key, value, d_out = (x[:, t].to(wide) for x in (q, k, v, d_output))
                    d_state = d_state + scale * outer(query, d_out)
                    dq[:, t] = scale * torch.einsum("bhv,bhkv->bhk", d_out, states[t + 1 - start])
                    dk[:, t] = torch.einsum("bhkv,bhv->bhk", d_state, value)
                    dv[:, t] = torch.einsum("bhkv,bhk->bhv", d_state, key)
                    d_state = decay_at(log_decay, t, wide) * d_state
                    if log_decay is not None:
                        per_key = (states[t - start] * d_state).sum(3)  # [B H K]
                        if log_decay.ndim == 1:
                            d_log += per_key.sum((0, 2))
                        else:
                            d_log[:, t] = per_key if log_decay.ndim == 4 else per_key.sum(2)
            if initial_state is not None:
                d_initial[stretch.rows] = d_state
    d_log_decay.copy_(d_log)
    return dq, dk, dv, d_log_decay, d_initial


@recurrent_backward_op.register_fake
def _allocate_backward(
    d_output: Tensor,
    d_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_zeros(x.shape)

    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), like(log_decay), like(initial_state)


def differentiate_by(op: CustomOpDef, backward: CustomOpDef) -> None:
    """Register the gradient of a recurrent op, of this family or the delta family's.

    Its inputs are q, k, v, what else the family has, log_decay, initial_state, cu_seqlens, the scale, and whether
    states are kept; its results those of `recurrent_op`.
    """

    def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.scale, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[2])

    def gradients(
        ctx: Any, d_output: Tensor | None, d_final_state: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *inputs, kept = ctx.saved_tensors
        v, log_decay, initial_state = inputs[2], inputs[-3], inputs[-2]
        if d_output is None:
            d_output = torch.zeros_like(v)
        *d_inputs, d_log_decay, d_initial = backward(d_output, d_final_state, *inputs, kept, ctx.scale)
        return (
            *d_inputs,
            None if log_decay is None else d_log_decay,
            None if initial_state is None else d_initial,
            *(None,) * 3,
        )

    op.register_autograd(gradients, setup_context=save_for_backward)


differentiate_by(recurrent_op, recurrent_backward_op)


def one_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output [B 1 H V] and state [B H K V] of one token, in plain operations."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with no_autocast(q.device):
        query, key, value = (x.squeeze(1).to(wide) for x in (q, k, v))  # [B H *]
        # not transposed: an axis of one would keep its stride, which the state would take over
        column, value = once(key[..., None], 2), value[:, :, None]
        if initial_state is None:
            state = column * value
        else:
            kept, decay = initial_state.to(wide), decay_at(log_decay, 0, wide)
            kept = kept * once(decay, 1) if isinstance(decay, Tensor) else kept
            # one pass over the state less than a product and a sum
            state = torch.addcmul(kept, column, value)
        output = once(scale * query[:, :, None], 3) @ state
    return output.to(q.dtype).transpose(1, 2), state
