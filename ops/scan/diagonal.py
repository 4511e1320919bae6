"""Scan with a complex state vector per channel and fixed decays: a diagonal state space model (S4D, arXiv 2206.11893).

    h_t = exp(a + i angle) h_{t-1} + x_t            state  [K C], complex; outside of the op [K C 2]
    o_t = Re(sum_k w h_t)                           [C]

The states of all tokens would be 2 K times as large as the inputs, so only those of one group of blocks are in memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..recurrence.groups import Group
from ..runtime.kernel import Probe
from .blocks import GroupGradients, Rule, group_tokens, scan_op, state_dtype, tokens_first


class Diagonal(NamedTuple):
    """Inputs of the diagonal scan."""

    x: Tensor
    """Inputs, [B T C]."""
    log_decay: Tensor
    """Natural log of the decays a, <= 0, [K C]."""
    angle: Tensor
    """Rotation per token in radians, [K C]."""
    weight: Tensor
    """Output weights w as pairs of real numbers, [K C 2]."""
    initial_state: Tensor | None
    """Initial states as pairs of real numbers, [N K C 2]; None means zeros."""
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
        keys, channels = self.log_decay.shape
        return Probe(device=self.x.device, dtype=self.x.dtype, key_width=keys, value_width=channels)

    @property
    def w(self) -> Tensor:
        """Weights as complex numbers, [K C]."""
        return torch.complex(*self.weight.to(state_dtype(self.x)).unbind(-1))


class DiagonalScan(Rule[Diagonal]):
    """Recurrence of the diagonal scan."""

    is_complex = True

    def shape(self, x: Diagonal) -> tuple[int, ...]:
        return tuple(x.log_decay.shape)

    def terms(self, x: Diagonal, group: Group) -> tuple[Tensor, Tensor]:
        dtype = state_dtype(x.x)
        # float64: a large angle loses the digits that matter in float32
        log_decay = torch.complex(x.log_decay.double(), x.angle.double())
        new = group_tokens(x.x, group, dtype)
        written = new.new_zeros((*new.shape[:3], *log_decay.shape, 2))
        written[..., 0].copy_(new[..., None, :])
        return log_decay, torch.view_as_complex(written)

    def read(self, x: Diagonal, group: Group, states: Tensor) -> Tensor:  # noqa: ARG002
        return (states * x.w).sum(-2).real

    def d_states(self, x: Diagonal, group: Group, d_output: Tensor) -> Tensor:  # noqa: ARG002
        return x.w.conj_physical() * d_output.to(state_dtype(x.x))[..., None, :]

    def gradients(self, x: Diagonal, group: Group, grads: GroupGradients, out: dict[str, Tensor]) -> None:
        if "x" in out:
            tokens_first(out["x"], group).copy_(torch.view_as_real(grads.d_written)[..., 0].sum(-2))
        if "log_decay" in out or "angle" in out:
            both = torch.view_as_real(grads.d_log_decay).sum((0, 1, 2))
            for i, name in enumerate(("log_decay", "angle")):
                if name in out:
                    out[name] += both[..., i]
        if "weight" in out:
            d_output = grads.d_output.to(state_dtype(x.x))[..., None, :]
            d_weight = (grads.states * d_output).sum((0, 1, 2)).conj_physical()
            out["weight"] += torch.view_as_real(d_weight)


DIAGONAL = scan_op("diagonal_scan", Diagonal, DiagonalScan())
