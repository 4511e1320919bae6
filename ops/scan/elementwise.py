"""Scan of independent elements; the output is the state itself.

h_t = exp(a_t) h_{t-1} + x_t                    output  h_t
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..recurrence.groups import Group
from ..runtime.kernel import Probe
from .blocks import GroupGradients, Rule, copy_group_tokens, scan_op, state_dtype, tokens_first


class Scan(NamedTuple):
    """Inputs of `scan` and `log_scan`."""

    x: Tensor
    """Inputs (for `log_scan` their logarithms), [B T *E]."""
    log_decay: Tensor
    """Natural log of the decays, <= 0, [B T *E]."""
    initial_state: Tensor | None
    """Initial states, [N *E]; None means 0, or -inf for `log_scan`."""
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
        width = self.x.shape[2:].numel()
        return Probe(device=self.x.device, dtype=self.x.dtype, key_width=1, value_width=width, log_decay="B T H")


class Elementwise(Rule[Scan]):
    """Recurrence of `scan`."""

    def shape(self, x: Scan) -> tuple[int, ...]:
        return tuple(x.x.shape[2:])

    def terms(self, x: Scan, group: Group) -> tuple[Tensor, Tensor]:
        dtype = state_dtype(x.x)
        return copy_group_tokens(x.log_decay, group, dtype), copy_group_tokens(x.x, group, dtype)

    def read(self, x: Scan, group: Group, states: Tensor) -> Tensor:  # noqa: ARG002
        return states

    def d_states(self, x: Scan, group: Group, d_output: Tensor) -> Tensor:  # noqa: ARG002
        return d_output.to(state_dtype(x.x), copy=True, memory_format=torch.contiguous_format)

    def gradients(self, x: Scan, group: Group, grads: GroupGradients, out: dict[str, Tensor]) -> None:  # noqa: ARG002
        for name, gradient in {"x": grads.d_written, "log_decay": grads.d_log_decay}.items():
            if name in out:
                tokens_first(out[name], group).copy_(gradient)


SCAN = scan_op("scan", Scan, Elementwise())
