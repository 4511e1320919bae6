"""Scan with a state vector per channel, written and read by keys and queries that all channels share (Mamba, arXiv
2312.00752).

    h_t = exp(step_t rate) h_{t-1} + k_t x_t^T      state  [K C]; one rate per element of the state
    o_t = q_t h_t                                   [C]

The states of all tokens would be K times as large as the inputs, so only those of one group of blocks are in memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..recurrence.groups import Group
from ..runtime.kernel import Probe
from .blocks import GroupGradients, Rule, group_tokens, scan_op, state_dtype, tokens_first


class Selective(NamedTuple):
    """Inputs of the selective scan."""

    x: Tensor
    """Inputs, [B T C]."""
    step: Tensor
    """Step sizes, >= 0, [B T C]."""
    rate: Tensor
    """Log-decay per unit of step, <= 0, [K C]."""
    k: Tensor
    """Keys, [B T K]."""
    q: Tensor
    """Queries, [B T K]."""
    initial_state: Tensor | None
    """Initial states, [N K C]; None means zeros."""
    cu_seqlens: Tensor | None
    """Boundaries of packed documents, [N+1]; None if the batch is not packed."""
    boundaries: Sequence[int] | None
    """Values of cu_seqlens; None where they are not known on the host."""
    chunk_size: int
    """Number of tokens per block."""
    output_final_state: bool
    """True if the final state is requested."""
    one_block_at_a_time: bool
    """True if blocks are computed one by one, False if several at once."""
    needs_grad: bool = False
    """True if a backward pass may follow; set by the op."""

    def probe(self) -> Probe:
        """Return the properties of this call that a kernel must support."""
        keys, channels = self.rate.shape
        return Probe(device=self.x.device, dtype=self.x.dtype, key_width=keys, value_width=channels)


class SelectiveScan(Rule[Selective]):
    """Recurrence of the selective scan."""

    def shape(self, x: Selective) -> tuple[int, ...]:
        return tuple(x.rate.shape)

    def terms(self, x: Selective, group: Group) -> tuple[Tensor, Tensor]:
        dtype = state_dtype(x.x)
        log_decay = _across_keys(x.step, group, dtype) * x.rate.to(dtype)
        return log_decay, _across_channels(x.k, group, dtype) * _across_keys(x.x, group, dtype)

    def read(self, x: Selective, group: Group, states: Tensor) -> Tensor:
        return (group_tokens(x.q, group, states.dtype)[..., None, :] @ states)[..., 0, :]

    def d_states(self, x: Selective, group: Group, d_output: Tensor) -> Tensor:
        dtype = state_dtype(x.x)
        return _across_channels(x.q, group, dtype) * d_output.to(dtype)[..., None, :]

    def gradients(self, x: Selective, group: Group, grads: GroupGradients, out: dict[str, Tensor]) -> None:
        dtype = grads.states.dtype
        by_token: dict[str, Tensor] = {}
        if "x" in out:
            by_token["x"] = (group_tokens(x.k, group, dtype)[..., None, :] @ grads.d_written)[..., 0, :]
        if "k" in out:
            by_token["k"] = (grads.d_written @ group_tokens(x.x, group, dtype)[..., None])[..., 0]
        if "q" in out:
            by_token["q"] = (grads.states @ grads.d_output.to(dtype)[..., None])[..., 0]
        if "step" in out:
            by_token["step"] = (grads.d_log_decay * x.rate.to(dtype)).sum(-2)
        if "rate" in out:
            out["rate"] += (grads.d_log_decay * _across_keys(x.step, group, dtype)).sum((0, 1, 2))
        for name, gradient in by_token.items():
            tokens_first(out[name], group).copy_(gradient)


def _across_keys(x: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """Return a group's per-channel values, shaped [m n B 1 C] to broadcast over keys."""
    return group_tokens(x, group, dtype).contiguous()[..., None, :]


def _across_channels(x: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """Return a group's per-key values, shaped [m n B K 1] to broadcast over channels."""
    return group_tokens(x, group, dtype).contiguous()[..., None]


SELECTIVE = scan_op("selective_scan", Selective, SelectiveScan())
