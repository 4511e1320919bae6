"""Scan in the log domain: sums of exponentials that would overflow as floats.

    h_t = log(exp(a_t + h_{t-1}) + exp(x_t))        output  h_t; the default initial state is -inf

Mixers with exponential gates use it as their normaliser: the share of the old state, exp(a_t + h_{t-1} - h_t), and the
share of the new input, exp(x_t - h_t), add up to 1. The backward pass is a linear scan from the last token to the first
whose decays are the shares of the old state.
"""

import torch
from torch import Tensor

from ..runtime.custom_op import Gradients, Op
from .blocks import Layout, copy_group_tokens, run_blocks, state_dtype, token_groups, tokens_first
from .elementwise import SCAN, Scan

LOG_STATE = torch.float64
"""Dtype of states. A logarithm of about 10 in float32 gives its exponential only six digits, and errors of many tokens
add up where decays are slow."""


def _layout(x: Scan) -> Layout | None:
    """Return where packed documents begin and end; None if the batch is not packed."""
    return Layout.of(x.cu_seqlens, x.boundaries, x.x.shape[1])


def _initial(x: Scan) -> Tensor:
    """Return the initial states, [N *E]; -inf by default."""
    rows = x.x.shape[0] if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    if x.initial_state is None:
        return x.x.new_full((rows, *x.x.shape[2:]), -torch.inf, dtype=LOG_STATE)
    return x.initial_state.to(LOG_STATE)


def log_step(written: Tensor, factor: Tensor, state: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return the state after a token: logaddexp of its input and of the decayed state before it."""
    return torch.logaddexp(written, factor + state, out=out)


def _allocate(x: Scan) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the output, the final state, and the output in the dtype of states, saved for the backward pass."""
    final = torch.empty_like(_initial(x) if x.output_final_state else x.x.new_empty(0, dtype=LOG_STATE))
    return x.x.new_empty(x.x.shape), final, x.x.new_empty(x.x.shape if x.needs_grad else 0, dtype=state_dtype(x.x))


def _forward(x: Scan) -> tuple[Tensor, Tensor, Tensor]:
    output, final, saved = _allocate(x)
    layout = _layout(x)
    initial = _initial(x)
    if x.output_final_state:
        final.copy_(initial)  # empty documents keep their initial state
    state = initial if layout is None else initial.new_full((1, *initial.shape[1:]), -torch.inf)
    for group in token_groups(x, output, state[0].numel()):
        log_decay = copy_group_tokens(x.log_decay, group, initial.dtype)
        h = copy_group_tokens(x.x, group, initial.dtype)
        firsts = None if layout is None else layout.firsts(group)
        if firsts is not None:
            firsts.put(h, log_step(firsts.of(h), firsts.of(log_decay), initial[firsts.document]))
            firsts.put(log_decay, -torch.inf)
        entries = h.new_empty(h.shape[1:])
        run_blocks(log_decay, h, log_decay.sum(0), state, entries, firsts, log_step)
        tokens_first(output, group).copy_(h)
        if x.needs_grad:
            tokens_first(saved, group).copy_(h)
        state = h[-1, -1]
        if layout is not None and x.output_final_state:
            lasts = layout.lasts(group)
            final[lasts.document] = lasts.of(h)
    if layout is None and x.output_final_state:
        final.copy_(state)
    return output, final, saved


def _backward(x: Scan, gradients: Gradients) -> dict[str, Tensor]:
    (d_output, d_final), (h,) = gradients.outputs, gradients.saved
    d_h = torch.zeros_like(h) if d_output is None else d_output.to(h.dtype, copy=True)
    layout = _layout(x)
    initial = _initial(x).to(h.dtype)
    row, first = (slice(None), 0) if layout is None else (0, layout.first)
    document = slice(None) if layout is None else layout.document
    d_initial = torch.zeros_like(initial)
    if d_final is not None and d_final.numel():
        d_h[row, -1 if layout is None else layout.last] += d_final[document].to(h.dtype)
        if layout is not None:
            d_initial.copy_(d_final)  # empty documents: the final state is the initial one
    # log of the old state's share in h_t, per token
    before = torch.cat((h[:, :1], h[:, :-1]), dim=1)
    before[row, first] = initial[document]
    old_share = x.log_decay.to(h.dtype) + before - h
    next_share = torch.cat((old_share[:, 1:], torch.zeros_like(old_share[:, :1])), dim=1)
    reversed_documents = None if x.cu_seqlens is None else (x.cu_seqlens[-1] - x.cu_seqlens).flip(0)
    reversed_scan = Scan(
        d_h.flip(1),
        next_share.flip(1),
        initial_state=None,
        cu_seqlens=reversed_documents,
        boundaries=None,
        chunk_size=x.chunk_size,
        output_final_state=False,
        one_block_at_a_time=x.one_block_at_a_time,
    )
    d_h = SCAN.forward(reversed_scan)[0].flip(1)
    d_log_decay = d_h * old_share.exp()
    d_initial[document] = d_log_decay[row, first]
    d_x = d_h * (x.x.to(h.dtype) - h).exp()
    d_inputs = {"x": d_x, "log_decay": d_log_decay}
    return d_inputs if x.initial_state is None else d_inputs | {"initial_state": d_initial}


LOG_SCAN = Op("log_scan", Scan, fake=_allocate, forward=_forward, backward=_backward, saves=1)
