"""The cell of sLSTM: memories by channel whose gates read the output of the token before.

    i, f, z, o = g_t + h_{t-1} R               logits of D channels each, one matrix R per head
    s_t = sigmoid(i - log f' - l_{t-1})        share of the new token; log f' = log sigmoid(f), or f
    l_t = log(f' e^{l_{t-1}} + e^i)
    a_t = (1 - s_t) a_{t-1} + s_t tanh(z)
    h_t = sigmoid(o) a_t                       output

a is the quotient c / n of the paper's cell and normaliser, and l = log n. As shares are between 0 and 1, no gate can
overflow, and no maximum is carried along. The state is h and a, [H 2 D], and l in float64, -inf at the start.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.custom_op import Gradients, Op
from ..runtime.kernel import Probe
from ..runtime.packing import stretches
from ..scan.logarithmic import LOG_STATE


class SLSTM(NamedTuple):
    """Inputs of `slstm`."""

    gates: Tensor
    """Terms of the tokens in the logits of i, f, z and o, [B T H 4D]."""
    recurrent: Tensor
    """Matrices R, [H D 4D]."""
    memory: Tensor | None
    """Initial h and a, [N H 2 D]; None means zeros."""
    weight: Tensor | None
    """Initial l, [N H D]; None means -inf."""
    cu_seqlens: Tensor | None
    """Boundaries of packed documents, [N+1]; None if the batch is not packed."""
    boundaries: Sequence[int] | None
    """Values of cu_seqlens; None where they are not known on the host."""
    exponential: bool
    """True if the forget gate is exp(f), False if it is sigmoid(f)."""
    output_final_state: bool
    """True if the final state is requested."""
    needs_grad: bool = False
    """True if a backward pass may follow; set by the op."""

    @property
    def wide_dtype(self) -> torch.dtype:
        """Dtype of h, a and all sums: float32, or float64 for float64 inputs."""
        return torch.promote_types(self.gates.dtype, torch.float32)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of state rows, heads and channels of a head, (N, H, D)."""
        rows = self.gates.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        return rows, self.recurrent.shape[0], self.recurrent.shape[1]

    def probe(self) -> Probe:
        """Return the properties of this call that a kernel must support."""
        return Probe(device=self.gates.device, dtype=self.gates.dtype, key_width=1, value_width=self.shape[2])


def allocate(x: SLSTM) -> tuple[Tensor, ...]:
    """Allocate output, final memory and weight, and what the backward pass needs: logits, means a and shares s."""
    rows, heads, width = x.shape
    per_token = (*x.gates.shape[:2], heads)
    final = (rows, heads) if x.output_final_state else (0, 0)
    saved = per_token if x.needs_grad else (0, 0, 0)

    def new(*shape: int, dtype: torch.dtype = x.wide_dtype) -> Tensor:
        return x.gates.new_empty(shape, dtype=dtype)

    return (
        new(*per_token, width),
        new(*final, 2, width),
        new(*final, width, dtype=LOG_STATE),
        new(*saved, 4 * width),
        new(*saved, width),
        new(*saved, width),
    )


def _forward(x: SLSTM) -> tuple[Tensor, ...]:
    output, memory, weight, logits, means, shares = allocated = allocate(x)
    rows, heads, width = x.shape
    wide = x.wide_dtype
    recurrent = x.recurrent.to(wide)
    for states, start, stop in stretches(x.gates.shape[0], x.gates.shape[1], x.cu_seqlens, x.boundaries):
        number = len(range(rows)[states])
        if x.memory is None:
            h = a = x.gates.new_zeros(number, heads, width, dtype=wide)
        else:
            h, a = x.memory[states].to(wide).unbind(2)
        empty = (number, heads, width)
        log_sum = (
            x.gates.new_full(empty, -torch.inf, dtype=LOG_STATE) if x.weight is None else x.weight[states].double()
        )
        for t in range(start, stop):
            # heads first, so that a product does not copy the matrices for every row
            product = (h.transpose(0, 1) @ recurrent).transpose(0, 1)
            logit = x.gates[:, t].to(wide) + product
            i, f, z, o = logit.unflatten(-1, (4, width)).unbind(-2)
            old = (f if x.exponential else F.logsigmoid(f)) + log_sum
            share = (i - old).sigmoid().to(wide)
            log_sum = torch.logaddexp(old, i.double())
            a = torch.lerp(a, z.tanh(), share)
            h = o.sigmoid() * a
            output[:, t] = h
            if x.needs_grad:
                logits[:, t] = logit
                means[:, t] = a
                shares[:, t] = share
        if x.output_final_state:
            memory[states] = torch.stack((h, a), dim=2)
            weight[states] = log_sum
    return allocated


def _backward(x: SLSTM, gradients: Gradients) -> dict[str, Tensor]:
    d_output, d_memory, d_weight = gradients.outputs
    logits, means, shares = gradients.saved
    rows, heads, width = x.shape
    wide = x.wide_dtype
    transposed = x.recurrent.to(wide).mT
    d_gates = torch.empty_like(logits)
    d_initial = logits.new_empty(rows, heads, 2, width)
    d_initial_weight = logits.new_empty(rows, heads, width)
    for states, start, stop in stretches(x.gates.shape[0], x.gates.shape[1], x.cu_seqlens, x.boundaries):
        number = len(range(rows)[states])
        zeros = logits.new_zeros(number, heads, width)
        dh, da = (zeros, zeros) if d_memory is None else d_memory[states].to(wide).unbind(2)
        dl = zeros if d_weight is None else d_weight[states].to(wide)
        first = zeros if x.memory is None else x.memory[states].to(wide)[:, :, 1]
        for t in reversed(range(start, stop)):
            _, f, z, o = logits[:, t].unflatten(-1, (4, width)).unbind(-2)
            a, share = means[:, t], shares[:, t]
            before = means[:, t - 1] if t > start else first
            opened, value = o.sigmoid(), z.tanh()
            dh = dh if d_output is None else dh + d_output[:, t].to(wide)
            da = da + dh * opened
            d_share = da * (value - before) * share * (1 - share)
            d_old = dl * (1 - share) - d_share
            d_logits = (
                d_share + dl * share,
                d_old if x.exponential else d_old * (-f).sigmoid(),
                da * share * (1 - value.square()),
                dh * a * opened * (1 - opened),
            )
            d_gates[:, t] = torch.cat(d_logits, dim=-1)
            da, dl = da * (1 - share), d_old
            dh = (d_gates[:, t].transpose(0, 1) @ transposed).transpose(0, 1)
        d_initial[states] = torch.stack((dh, da), dim=2)
        d_initial_weight[states] = dl
    return named_gradients(x, gradients, d_gates, d_initial, d_initial_weight)


def named_gradients(
    x: SLSTM, gradients: Gradients, d_gates: Tensor, d_memory: Tensor, d_weight: Tensor
) -> dict[str, Tensor]:
    """Return the gradients of all inputs by name; that of R is a product of h_{t-1} and d_gates, of all tokens at once.

    Args:
        x: the inputs.
        gradients: the arguments of the backward pass.
        d_gates: gradient of `gates`.
        d_memory: gradient of the initial `memory`.
        d_weight: gradient of the initial `weight`.
    """
    named = {"gates": d_gates, "memory": d_memory, "weight": d_weight}
    if "recurrent" in gradients.wanted:
        logits, means, _ = gradients.saved
        hidden = logits[..., 3 * x.shape[2] :].sigmoid() * means
        before = torch.zeros_like(hidden)
        for states, start, stop in stretches(x.gates.shape[0], x.gates.shape[1], x.cu_seqlens, x.boundaries):
            if stop > start:
                before[:, start + 1 : stop] = hidden[:, start : stop - 1]
                if x.memory is not None:
                    before[:, start] = x.memory[states][:, :, 0].to(hidden.dtype)
        by_head = (y.flatten(0, 1).transpose(0, 1) for y in (before, d_gates))
        h, d = by_head
        named["recurrent"] = h.mT @ d
    return named


SLSTM_OP = Op("slstm", SLSTM, fake=allocate, forward=_forward, backward=_backward, outputs=6, saves=3)


def slstm_recurrent(x: SLSTM) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Compute the cell token by token: the definition."""
    output, memory, weight, *_ = SLSTM_OP(x)
    return output.to(x.gates.dtype), (memory, weight) if x.output_final_state else None
