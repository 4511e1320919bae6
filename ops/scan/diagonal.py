"""The scan of a complex vector per channel with fixed decays: a diagonal state space model (S4D, arXiv 2206.11893).

    h_t = exp(a + i angle) h_{t-1} + x_t            state  [K C], complex; outside of the op [K C 2]
    o_t = Re(sum_k w h_t)                           [C]

The states of all tokens would be 2 K times as large as the inputs; they exist for a group of blocks at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..recurrence.groups import Group
from .blocks import GroupGradients, Rule, cut, scan_op, tokens_first, wide


class Diagonal(NamedTuple):
    """One call of the diagonal scan."""

    x: Tensor
    """[B T C]."""
    log_decay: Tensor
    """[K C]."""
    angle: Tensor
    """[K C]."""
    weight: Tensor
    """w, [K C 2]."""
    initial_state: Tensor | None
    """[N K C 2]."""
    cu_seqlens: Tensor | None
    boundaries: Sequence[int] | None
    chunk_size: int
    output_final_state: bool
    single: bool
    needs_grad: bool = False

    @property
    def w(self) -> Tensor:
        """The weights as complex numbers."""
        return torch.view_as_complex(self.weight.to(wide(self.x)).contiguous())


class DiagonalScan(Rule[Diagonal]):
    """The family of `Diagonal`."""

    is_complex = True

    def shape(self, x: Diagonal) -> tuple[int, ...]:
        return tuple(x.log_decay.shape)

    def terms(self, x: Diagonal, group: Group) -> tuple[Tensor, Tensor]:
        dtype = wide(x.x)
        # an angle of many turns, or of many tokens, has few digits left
        log_decay = torch.complex(x.log_decay.double(), x.angle.double())
        new = cut(x.x, group, dtype)
        written = new.new_zeros((*new.shape[:3], *log_decay.shape, 2))
        written[..., 0].copy_(new[..., None, :])
        return log_decay, torch.view_as_complex(written)

    def read(self, x: Diagonal, group: Group, states: Tensor) -> Tensor:  # noqa: ARG002
        return (states * x.w).sum(-2).real

    def d_states(self, x: Diagonal, group: Group, d_output: Tensor) -> Tensor:  # noqa: ARG002
        return x.w.conj_physical() * d_output.to(wide(x.x))[..., None, :]

    def gradients(self, x: Diagonal, group: Group, of: GroupGradients, out: dict[str, Tensor]) -> None:
        if "x" in out:
            tokens_first(out["x"], group).copy_(torch.view_as_real(of.d_written)[..., 0].sum(-2))
        if "log_decay" in out or "angle" in out:
            both = torch.view_as_real(of.d_log_decay).sum((0, 1, 2))
            for i, name in enumerate(("log_decay", "angle")):
                if name in out:
                    out[name] += both[..., i]
        if "weight" in out:
            d_output = of.d_output.to(wide(x.x))[..., None, :]
            d_weight = (of.states * d_output).sum((0, 1, 2)).conj_physical()
            out["weight"] += torch.view_as_real(d_weight)


DIAGONAL = scan_op("diagonal_scan", Diagonal, DiagonalScan())
