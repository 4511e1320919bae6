"""Test-time training: a memory that is a small network, trained on the tokens while it reads them (arXiv 2407.04620).

Notation: B batch, T tokens, H heads, D width of a head, b tokens per mini-batch, i place of token t in it (from 1).

    f(x)  = x + LN(net(x))                      net: x W + b, or gelu(x W + b) W' + b'
    loss  = |f(k_j) - v_j|^2 / 2                so that LN(net(k_j)) learns v_j - k_j
    W_t   = W_0 - c_i sum_{j<=t} r_j grad_j     gradients of the batch's tokens at its start, W_0; biases alike
    o_t   = f(q_t), with W_t                    the next batch starts at the last W_t

The recurrent paradigm computes W_t token by token (the primal form). The chunkwise one computes a batch at once, not
W_t (the dual form): x W_t = x W_0 - c_i sum_{j<=t} r_j (x . x_j) g_j, where g_j is the gradient of the layer's output.

A batch is a part of the definition: a document starts a batch, and the place within it is part of the state. Gradients
go through the inner gradients, by autograd.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...registry import SeqmixError
from ..runtime.call import Call
from ..runtime.paradigm import Paradigm
from .batch_loop import Slot, padded_length, read_batches, where
from .network import Norm, backpropagate, gelu, loss_gradient, normed, require_layers

TTT_PARADIGMS = frozenset({Paradigm.RECURRENT, Paradigm.CHUNKWISE})
"""Paradigms of test-time training."""


class FastLayer(NamedTuple):
    """State of one layer of the memory: its parameters, and the sums of its gradients in the batch so far."""

    weight: Float[Tensor, "N H I O"]
    """Matrix at the start of the batch."""
    bias: Float[Tensor, "N H 1 O"]
    """Bias at the start of the batch."""
    weight_sum: Float[Tensor, "N H I O"]
    """Sum of r_j grad_j of the matrix, over the batch's tokens so far."""
    bias_sum: Float[Tensor, "N H 1 O"]
    """Sum of r_j grad_j of the bias, over the batch's tokens so far."""


class TTTOutput(NamedTuple):
    """Result of `ttt`."""

    output: Float[Tensor, "B T H D"]
    """Output, in the dtype of the queries."""
    layers: tuple[FastLayer, ...] | None
    """State after the last token; None unless requested."""


def ttt(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T H D"],
    v: Float[Tensor, "B T H D"],
    rate: Float[Tensor, "B T H"],
    factor: Float[Tensor, " b"],
    layers: Sequence[FastLayer],
    position: Int[Tensor, " N"],
    call: Call,
    norm: Norm | None = None,
) -> TTTOutput:
    """Read a segment with a memory that trains on it.

    Args:
        q: queries.
        k: keys, the inputs of the loss.
        v: values, its targets.
        rate: learning rates r of the tokens.
        factor: factors c of the steps, by place in the mini-batch; their number is the batch's size b.
        layers: state of the memory's layers before the segment.
        position: number of tokens before the segment.
        call: the mixer's call, of which paradigm, documents and `return_state` are used.
        norm: the layer norm; None for none.

    Raises:
        SeqmixError: the shapes do not fit, or the paradigm is the parallel one.
    """
    heads, width = q.shape[2:]
    if call.paradigm not in TTT_PARADIGMS:
        raise SeqmixError(f"ttt has the paradigms chunkwise and recurrent, got {call.paradigm}")
    if not q.shape == k.shape == v.shape or rate.shape != q.shape[:3] or factor.ndim != 1:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v, rate, factor))
        raise SeqmixError(f"ttt expects q, k and v [B T H D], rate [B T H] and factor [b], got {shapes}")
    require_layers("ttt", layers, (call.rows(q.shape[0]), heads, width))

    def read(slot: Slot, state: tuple[FastLayer, ...]) -> tuple[Tensor, tuple[FastLayer, ...]]:
        output, state = _read_slot(slot, factor, state, norm, whole=call.paradigm is Paradigm.CHUNKWISE)
        return output, where(slot.complete, _step(state, factor[-1].to(output.dtype)), state)

    with torch.autocast(q.device.type, enabled=False):
        tokens = q, k, v, rate[..., None]
        return TTTOutput(*read_batches(tokens, factor.shape[0], tuple(layers), position, call, read))


def _step(layers: tuple[FastLayer, ...], factor: Tensor) -> tuple[FastLayer, ...]:
    """Take the step of a batch's last token."""
    stepped = []
    for x in layers:
        weight, bias = x.weight - factor * x.weight_sum, x.bias - factor * x.bias_sum
        stepped.append(FastLayer(weight, bias, torch.zeros_like(weight), torch.zeros_like(bias)))
    return tuple(stepped)


def _read_slot(
    slot: Slot, factors: Tensor, layers: tuple[FastLayer, ...], norm: Norm | None, *, whole: bool
) -> tuple[Tensor, tuple[FastLayer, ...]]:
    """Return the outputs of a slot's tokens, and the state with their gradients added to its sums."""
    q, k, v, rate = slot.inputs
    factor = factors.to(q.dtype)[slot.place][:, None, :, None]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    inputs, gradients = backpropagate(k, weights, biases, lambda y: loss_gradient(y, v - k, norm))
    after = []
    y = q
    for number, (layer, key, gradient) in enumerate(zip(layers, inputs, gradients, strict=True)):
        scaled = rate * gradient
        y = y if number == 0 else gelu(y)
        if whole:  # a batch, dual form
            step = (y @ key.mT + 1).tril() @ scaled + y @ layer.weight_sum + layer.bias_sum
            y = y @ layer.weight + layer.bias - factor * step
            sums = layer.weight_sum + key.mT @ scaled, layer.bias_sum + scaled.sum(2, keepdim=True)
        else:  # one token, primal form
            sums = layer.weight_sum + key.mT * scaled, layer.bias_sum + scaled
            y = y @ (layer.weight - factor * sums[0]) + layer.bias - factor * sums[1]
        after.append(FastLayer(layer.weight, layer.bias, *sums))
    return q + normed(y, norm), tuple(after)


def ttt_flops(paradigm: Paradigm, length: int, widths: Sequence[int], batch: int, context: int = 0) -> int:
    """Count the operations of one head's matrix products, for layers between these widths.

    Args:
        paradigm: the algorithm.
        length: tokens of the segment.
        widths: widths of the memory's input, hidden layers and output.
        batch: tokens per mini-batch.
        context: tokens before the segment; with any, the segment may begin within a batch and needs one slot more.
    """
    pairs = list(pairwise(widths))
    back = sum(a * b for a, b in pairs[1:])
    weights = sum(a * b for a, b in pairs)
    if paradigm is Paradigm.RECURRENT:
        return 2 * length * (2 * weights + back)
    return 2 * padded_length(length, batch, context) * (4 * weights + back + batch * sum(a + b for a, b in pairs))
