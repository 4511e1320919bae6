"""Test-time training with momentum and forgetting: the long-term memory of Titans (arXiv 2501.00663, equations 12-18).

Notation: B batch, T tokens, H heads, D width of a head, b tokens per mini-batch.

    M(x)  = net(x), or x + LN(net(x))       net: x W, or gelu(x W + b) W' + b'; biases are the last rows of matrices
    loss  = |M(k_t) - v_t|^2
    U_t   = eta_t U_{t-1} - theta_t grad_t              gradient at the weights of the start of t's mini-batch
    M_t   = (1 - alpha_t) M_{t-1} + U_t
    o_t   = M_t(q_t)

The recurrent paradigm computes M_t token by token. The chunkwise one computes a batch at once, not M_t. Both
recurrences are linear: a layer's M_t is a sum of M and U before the batch and of the steps of its tokens, and the
coefficients of all t are a matrix per head. With k_j the layer's input and s_j = -theta_j times the gradient of its
output,

    x M_t = a_t x M + c_t x U + sum_{j<=t} A_tj (x . k_j) s_j

The coefficients come from two bidiagonal systems, solved by substitution: without logarithms and quotients, so that
gates may be 0 and 1.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ...registry import SeqmixError
from ..runtime.call import Call
from ..runtime.paradigm import Paradigm
from .api import TTT_PARADIGMS
from .batch_loop import Slot, padded_length, read_batches
from .network import Norm, backpropagate, gelu, loss_gradient, normed, require_layers


class MomentumLayer(NamedTuple):
    """State of one layer of the memory; with a bias, I is one more than the width of its input."""

    weight: Float[Tensor, "N H I O"]
    """Matrix M after the last token."""
    start: Float[Tensor, "N H I O"]
    """Matrix at the start of the mini-batch, where gradients are taken; equal to `weight` between batches."""
    momentum: Float[Tensor, "N H I O"]
    """Momentum U after the last token."""


class TitansOutput(NamedTuple):
    """Result of `titans`."""

    output: Float[Tensor, "B T H D"]
    """Output, in the dtype of the queries."""
    layers: tuple[MomentumLayer, ...] | None
    """State after the last token; None unless requested."""


class _Coefficients(NamedTuple):
    """Coefficients of M_t, for all t of a slot, and of its last U: of M and U before the slot, and of the steps."""

    weight: Float[Tensor, "B H w 1"]
    """Coefficients a of M in M_t."""
    momentum: Float[Tensor, "B H w 1"]
    """Coefficients c of U in M_t."""
    steps: Float[Tensor, "B H w w"]
    """Coefficients A of the steps in M_t."""
    kept_momentum: Float[Tensor, "B H 1 1"]
    """Coefficient of U in the last U."""
    kept_steps: Float[Tensor, "B H w 1"]
    """Coefficients of the steps in the last U."""


def titans(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T H D"],
    v: Float[Tensor, "B T H D"],
    rate: Float[Tensor, "B T H"],
    momentum: Float[Tensor, "B T H"],
    forget: Float[Tensor, "B T H"],
    batch: int,
    layers: Sequence[MomentumLayer],
    position: Int[Tensor, " N"],
    call: Call,
    norm: Norm | None = None,
) -> TitansOutput:
    """Read a segment with a memory that trains on it, with momentum and forgetting.

    Args:
        q: queries.
        k: keys, the inputs of the loss.
        v: values, its targets.
        rate: learning rates theta.
        momentum: factors eta of the momentum, from 0 to 1.
        forget: forget gates alpha, from 0 to 1.
        batch: tokens of a mini-batch.
        layers: state of the memory's layers before the segment.
        position: number of tokens before the segment.
        call: the mixer's call, of which paradigm, documents and `return_state` are used.
        norm: layer norm LN of the network's output, to which its input is then added; None for the output alone.

    Raises:
        SeqmixError: the shapes do not fit, or the paradigm is the parallel one.
    """
    gates = rate, momentum, forget
    if call.paradigm not in TTT_PARADIGMS:
        raise SeqmixError(f"titans has the paradigms chunkwise and recurrent, got {call.paradigm}")
    if not q.shape == k.shape == v.shape or any(x.shape != q.shape[:3] for x in gates):
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v, *gates))
        raise SeqmixError(f"titans expects q, k and v [B T H D], and rate, momentum and forget [B T H], got {shapes}")
    heads, width = q.shape[2:]
    biased = layers[0].weight.shape[2] == width + 1
    require_layers("titans", layers, (call.rows(q.shape[0]), heads, width), bias_rows=int(biased))

    def read(slot: Slot, state: tuple[MomentumLayer, ...]) -> tuple[Tensor, tuple[MomentumLayer, ...]]:
        return _read_slot(slot, state, norm, whole=call.paradigm is Paradigm.CHUNKWISE, biased=biased)

    with torch.autocast(q.device.type, enabled=False):
        tokens = q, k, v, *(x[..., None] for x in gates)
        return TitansOutput(*read_batches(tokens, batch, tuple(layers), position, call, read))


def _read_slot(
    slot: Slot, layers: tuple[MomentumLayer, ...], norm: Norm | None, *, whole: bool, biased: bool
) -> tuple[Tensor, tuple[MomentumLayer, ...]]:
    """Return the outputs of a slot's tokens, and the state after them."""
    q, k, v, rate, eta, alpha = slot.inputs
    target = v if norm is None else v - k
    weights = [layer.start[:, :, :-1] if biased else layer.start for layer in layers]
    biases = [layer.start[:, :, -1:] for layer in layers] if biased else None
    inputs, gradients = backpropagate(k, weights, biases, lambda y: 2 * loss_gradient(y, target, norm))
    c = _coefficients(eta, alpha, slot.exists) if whole else None
    after = []
    y = q
    if biased:
        inputs = [_with_one(x) for x in inputs]
    for number, (layer, key, gradient) in enumerate(zip(layers, inputs, gradients, strict=True)):
        step = -rate * gradient
        y = y if number == 0 else gelu(y)
        y = _with_one(y) if biased else y
        if c is not None:  # a batch, dual form
            y = c.weight * (y @ layer.weight) + c.momentum * (y @ layer.momentum) + (c.steps * (y @ key.mT)) @ step
            last = c.weight[:, :, -1:] * layer.weight + c.momentum[:, :, -1:] * layer.momentum
            weight = last + key.mT @ (c.steps[:, :, -1, :, None] * step)
            momentum = c.kept_momentum * layer.momentum + key.mT @ (c.kept_steps * step)
        else:  # one token, primal form
            momentum = eta * layer.momentum + key.mT * step
            weight = (1 - alpha) * layer.weight + momentum
            y = y @ weight
        after.append(MomentumLayer(weight, torch.where(slot.complete, weight, layer.start), momentum))
    return y if norm is None else q + normed(y, norm), tuple(after)


def _with_one(x: Tensor) -> Tensor:
    """Return x with a further dimension of 1, which reads and writes the bias."""
    return F.pad(x, (0, 1), value=1.0)


def _coefficients(eta: Tensor, alpha: Tensor, exists: Tensor) -> _Coefficients:
    """Return the coefficients of a slot; an empty place changes neither M nor U."""
    eta = torch.where(exists, eta, 1)  # alpha and the rate are 0 there
    size = eta.shape[2] + 1
    eye = torch.eye(size, dtype=eta.dtype, device=eta.device)
    momentum = _recur(eta, eye)  # U_t as a sum of U, s_1, ..., from t = 0
    added = F.pad(momentum[:, :, 1:] * exists, (1, 0, 1, 0))
    unit = F.pad(eye[:1], (0, 1, 0, size - 1))
    weight = _recur(1 - alpha, unit + added)  # M_t as a sum of M, U, s_1, ..., from t = 0
    kept_momentum, kept_steps = momentum[:, :, -1:].split([1, size - 1], dim=-1)
    of_weight, of_momentum, of_steps = weight[:, :, 1:].split([1, 1, size - 1], dim=-1)
    return _Coefficients(of_weight, of_momentum, of_steps, kept_momentum, kept_steps.mT)


def _recur(factors: Float[Tensor, "B H w 1"], x: Float[Tensor, "*batch w+1 C"]) -> Float[Tensor, "B H w+1 C"]:
    """Return h_t = factors_t h_{t-1} + x_t, with h_0 = x_0."""
    system = torch.diag_embed(-factors[..., 0], offset=-1)  # ones on the diagonal are implied
    return torch.linalg.solve_triangular(system, x, upper=False, unitriangular=True)


def titans_flops(
    paradigm: Paradigm, length: int, widths: Sequence[int], batch: int, context: int = 0, *, biased: bool = False
) -> int:
    """Count the operations of one head's matrix products; the triangular solves are not counted.

    Args:
        paradigm: the algorithm.
        length: tokens of the segment.
        widths: widths of the memory's input, hidden layers and output.
        batch: tokens per mini-batch.
        context: tokens before the segment; with any, the segment may begin within a batch and needs one slot more.
        biased: True if the layers have biases.
    """
    pairs = list(pairwise(widths))
    gradients = sum(a * b for a, b in pairs) + sum(a * b for a, b in pairs[1:])
    weights = sum((a + biased) * b for a, b in pairs)
    if paradigm is Paradigm.RECURRENT:
        return 2 * length * (gradients + weights)
    scores = batch * sum(a + biased + b for a, b in pairs)
    return 2 * padded_length(length, batch, context) * (gradients + 4 * weights + scores)
