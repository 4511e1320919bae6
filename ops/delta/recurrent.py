"""The delta family's recurrent op for more than one token: the definition, token by token, with its own backward.

Notation of delta.py, and P_t = exp(a_t) S_{t-1} the state after the decay, e_t the error of its prediction:

    P_t = exp(a_t) S_{t-1}      e_t = v_t - k_t^T P_t     S_t = P_t + b_t k_t e_t^T      o_t = scale q_t S_t

and backward in time, with dS_t the gradient of the state behind token t:

    dS_t  = exp(a_{t+1}) dP_{t+1} + scale q_t do_t^T      de_t = b_t dS_t^T k_t          dP_t = dS_t - k_t de_t^T
    dq_t  = scale S_t do_t     dk_t = b_t dS_t e_t - P_t de_t      dv_t = de_t     db_t = <k_t, dS_t e_t>
    da_t  = <P_t, dP_t>

It is a reference: it shares no formula with the chunkwise op. Every BLOCK-th state is kept; the backward recomputes
the states between, so memory grows slowly with T.
"""

import torch
from torch import Tensor

from ..decay.recurrent import BLOCK, decay_at, differentiate_by, no_autocast, outer
from ..materialize import once
from ..packing import pieces, stretches


def _read(key: Tensor, state: Tensor) -> Tensor:
    """x^T S of one token: [B H K], [B H K V] -> [B H V]."""
    return torch.einsum("bhk,bhkv->bhv", key, state)


def _step(
    state: Tensor, key: Tensor, value: Tensor, beta: Tensor, decay: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """The state behind a token, what the decay left of the one before, and the error of the prediction."""
    decayed = decay * state
    error = value - _read(key, decayed)
    return decayed + outer(key, beta * error), decayed, error


@torch.library.custom_op("seqmix::delta_recurrent", mutates_args=())
def recurrent_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state [N H K V] and the kept states [blocks B H K V] (empty unless wanted)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    output, final_state, kept = _allocate(q, k, v, beta, log_decay, initial_state, cu_seqlens, scale, save_states)
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
                    state, _, _ = _step(state, *_token(k, v, beta, log_decay, t, wide))
                    output[:, t] = scale * _read(q[:, t].to(wide), state)
            final_state[stretch.rows] = state
    if save_states:
        kept[index:].zero_()  # documents that end in one block leave rows over
    return output, final_state, kept


def _token(
    k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, t: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor | float]:
    """What `_step` takes of one token."""
    return (
        k[:, t].to(dtype),
        v[:, t].to(dtype),
        beta[:, t, :, None].to(dtype),
        decay_at(log_decay, t, dtype),
    )


@recurrent_op.register_fake
def _allocate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
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


@torch.library.custom_op("seqmix::delta_recurrent_backward", mutates_args=())
def recurrent_backward_op(
    d_output: Tensor,
    d_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, d beta, d log_decay and d initial state; the last two are empty where the input is None."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv, d_beta, d_log_decay, d_initial = _allocate_backward(
        d_output, d_final_state, q, k, v, beta, log_decay, initial_state, cu_seqlens, kept, scale
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
                state, steps = kept[index], []
                for t in range(start, stop):
                    steps.append(_step(state, *_token(k, v, beta, log_decay, t, wide)))
                    state = steps[-1][0]
                for t in range(stop - 1, start - 1, -1):
                    state, decayed, error = steps[t - start]
                    key, _, rate, decay = _token(k, v, beta, log_decay, t, wide)
                    d_out = d_output[:, t].to(wide)
                    d_state = d_state + scale * outer(q[:, t].to(wide), d_out)
                    written = torch.einsum("bhkv,bhv->bhk", d_state, error)
                    d_error = rate * _read(key, d_state)
                    dq[:, t] = scale * torch.einsum("bhkv,bhv->bhk", state, d_out)
                    dk[:, t] = rate * written - torch.einsum("bhkv,bhv->bhk", decayed, d_error)
                    dv[:, t] = d_error
                    d_beta[:, t] = (key * written).sum(2)
                    d_state = d_state - outer(key, d_error)
                    if log_decay is not None:
                        per_head = (decayed * d_state).sum((2, 3))  # [B H]
                        if log_decay.ndim == 1:
                            d_log += per_head.sum(0)
                        else:
                            d_log[:, t] = per_head
                    d_state = decay * d_state
            if initial_state is not None:
                d_initial[stretch.rows] = d_state
    d_log_decay.copy_(d_log)
    return dq, dk, dv, d_beta, d_log_decay, d_initial


@recurrent_backward_op.register_fake
def _allocate_backward(
    d_output: Tensor,
    d_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_zeros(x.shape)

    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        beta.new_empty(beta.shape),
        like(log_decay),
        like(initial_state),
    )


differentiate_by(recurrent_op, recurrent_backward_op)


def one_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B 1 H V] and state [B H K V] of one token, in plain operations."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with no_autocast(q.device):
        query, key, error = (x.transpose(1, 2).to(wide) for x in (q, k, v))  # [B H 1 *]
        decayed = None
        if initial_state is not None:
            decay = decay_at(log_decay, 0, wide)
            decayed = initial_state.to(wide)
            decayed = decayed * once(decay, 1) if isinstance(decay, Tensor) else decayed
            error = error - once(key, 3) @ decayed
        state = once(key.transpose(2, 3), 2) * once(beta[:, 0, :, None, None].to(wide) * error, 3)
        if decayed is not None:
            state = decayed + state
        output = once(scale * query, 3) @ state
    return output.to(q.dtype).transpose(1, 2), state
