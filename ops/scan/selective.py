"""The scan of a vector per channel, which tokens write and read by shared keys and queries (Mamba, arXiv 2312.00752).

    h_t = exp(step_t rate) h_{t-1} + k_t x_t^T      state  [K C]; the rate is one scalar per element of it
    o_t = q_t h_t                                   [C]

The states of all tokens would be K times as large as the inputs; they exist for a group of blocks at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..recurrence.groups import Group
from .blocks import GroupGradients, Rule, cut, scan_op, tokens_first, wide


class Selective(NamedTuple):
    """One call of the selective scan."""

    x: Tensor
    """[B T C]."""
    step: Tensor
    """[B T C]."""
    rate: Tensor
    """[K C]."""
    k: Tensor
    """[B T K]."""
    q: Tensor
    """[B T K]."""
    initial_state: Tensor | None
    """[N K C]."""
    cu_seqlens: Tensor | None
    boundaries: Sequence[int] | None
    chunk_size: int
    output_final_state: bool
    single: bool
    needs_grad: bool = False


class SelectiveScan(Rule[Selective]):
    """The family of `Selective`."""

    def shape(self, x: Selective) -> tuple[int, ...]:
        return tuple(x.rate.shape)

    def terms(self, x: Selective, group: Group) -> tuple[Tensor, Tensor]:
        dtype = wide(x.x)
        log_decay = _per_key(x.step, group, dtype) * x.rate.to(dtype)
        return log_decay, _per_channel(x.k, group, dtype) * _per_key(x.x, group, dtype)

    def read(self, x: Selective, group: Group, states: Tensor) -> Tensor:
        return (cut(x.q, group, states.dtype)[..., None, :] @ states)[..., 0, :]

    def d_states(self, x: Selective, group: Group, d_output: Tensor) -> Tensor:
        dtype = wide(x.x)
        return _per_channel(x.q, group, dtype) * d_output.to(dtype)[..., None, :]

    def gradients(self, x: Selective, group: Group, of: GroupGradients, out: dict[str, Tensor]) -> None:
        dtype = of.states.dtype
        new: dict[str, Tensor] = {}
        if "x" in out:
            new["x"] = (cut(x.k, group, dtype)[..., None, :] @ of.d_written)[..., 0, :]
        if "k" in out:
            new["k"] = (of.d_written @ cut(x.x, group, dtype)[..., None])[..., 0]
        if "q" in out:
            new["q"] = (of.states @ of.d_output.to(dtype)[..., None])[..., 0]
        if "step" in out:
            new["step"] = (of.d_log_decay * x.rate.to(dtype)).sum(-2)
        if "rate" in out:
            out["rate"] += (of.d_log_decay * _per_key(x.step, group, dtype)).sum((0, 1, 2))
        for name, gradient in new.items():
            tokens_first(out[name], group).copy_(gradient)


def _per_key(x: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """[m n B 1 C] of what each channel has."""
    return cut(x, group, dtype).contiguous()[..., None, :]


def _per_channel(x: Tensor, group: Group, dtype: torch.dtype) -> Tensor:
    """[m n B K 1] of what each key has."""
    return cut(x, group, dtype).contiguous()[..., None]


SELECTIVE = scan_op("selective_scan", Selective, SelectiveScan())
