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
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ...registry import SeqmixError
from ..runtime.call import Call
from ..runtime.paradigm import Paradigm
from .batches import grid

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


class Norm(NamedTuple):
    """Layer norm of the memory's output, for queries and for the loss."""

    weight: Float[Tensor, "H D"]
    bias: Float[Tensor, "H D"]
    eps: float


class TTTOutput(NamedTuple):
    """Result of `ttt`."""

    output: Float[Tensor, "B T H D"]
    """Output, in the dtype of the queries."""
    layers: tuple[FastLayer, ...] | None
    """State after the last token; None unless requested."""


class _Tokens(NamedTuple):
    """Tokens of one slot, heads before tokens; an empty place has the rate 0."""

    q: Float[Tensor, "B H w D"]
    k: Float[Tensor, "B H w D"]
    v: Float[Tensor, "B H w D"]
    rate: Float[Tensor, "B H w 1"]
    factor: Float[Tensor, "B 1 w 1"]


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
    inputs, outputs = layers[0].weight.shape[2], layers[-1].weight.shape[3]
    rows = call.rows(q.shape[0])
    if (inputs, outputs) != (width, width) or any(x.shape[:2] != (rows, heads) for layer in layers for x in layer):
        shapes = ", ".join(str(list(layer.weight.shape)) for layer in layers)
        raise SeqmixError(f"ttt expects layers from D to D with N = {rows}, H = {heads}, D = {width}, got {shapes}")
    with torch.autocast(q.device.type, enabled=False):
        return _run(q, k, v, rate, factor, tuple(layers), position, call, norm)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    factor: Tensor,
    layers: tuple[FastLayer, ...],
    position: Tensor,
    call: Call,
    norm: Norm | None,
) -> TTTOutput:
    wide = layers[0].weight.dtype
    batch_size, length, heads, width = q.shape
    slots = grid(call, batch_size, length, factor.shape[0], position)
    count, size = slots.token.shape[1:]
    index = slots.token.flatten(1).expand(batch_size, -1)[..., None, None]

    def by_slot(x: Tensor) -> tuple[Tensor, ...]:
        padded = F.pad(x.to(wide), (0, 0, 0, 0, 0, 1))  # an empty place takes the zeros after the last token
        x = padded.gather(1, index.expand(-1, -1, *x.shape[2:]))
        return x.unflatten(1, (count, size)).transpose(2, 3).unbind(1)

    factors = factor.to(wide)[slots.place].expand(batch_size, -1, -1)[:, :, None, :, None].unbind(1)
    tokens = map(_Tokens, *map(by_slot, (q, k, v, rate[..., None])), factors)
    complete = slots.complete.expand(batch_size, -1)[..., None, None, None].unbind(1)
    state = layers
    if slots.document is not None:
        state = _rows(layers, slots.document[:1])
    results, states = [], []
    for c, (slot, ends) in enumerate(zip(tokens, complete, strict=True)):
        if c > 0 and slots.document is not None and slots.first is not None:
            initial = _rows(layers, slots.document[c : c + 1])
            state = _where(slots.first[c], initial, state)
        output, state = _read_slot(slot, state, norm, whole=call.paradigm is Paradigm.CHUNKWISE)
        state = _end_batch(state, ends, factor[-1].to(wide))
        results.append(output)
        states.append(state)
    joined = torch.stack(results, dim=1).transpose(2, 3).flatten(1, 2)
    output = joined.gather(1, slots.slot[..., None, None].expand(-1, -1, heads, width)).to(q.dtype)
    if not call.return_state:
        return TTTOutput(output, None)
    if slots.last is not None:
        leaves = [[torch.cat(leaf) for leaf in zip(*layer, strict=True)] for layer in zip(*states, strict=True)]
        ended = _rows(tuple(FastLayer(*layer) for layer in leaves), slots.last.clamp(min=0))
        state = _where((slots.last >= 0)[:, None, None, None], ended, layers)
    return TTTOutput(output, state)


def _rows(layers: Sequence[FastLayer], rows: Tensor) -> tuple[FastLayer, ...]:
    return tuple(FastLayer(*(x.index_select(0, rows) for x in layer)) for layer in layers)


def _where(condition: Tensor, first: Sequence[FastLayer], second: Sequence[FastLayer]) -> tuple[FastLayer, ...]:
    pairs = zip(first, second, strict=True)
    return tuple(FastLayer(*(torch.where(condition, x, y) for x, y in zip(*pair, strict=True))) for pair in pairs)


def _end_batch(layers: Sequence[FastLayer], ends: Tensor, factor: Tensor) -> tuple[FastLayer, ...]:
    """Take the step of the last token, in rows whose batch ends."""
    stepped = []
    for x in layers:
        weight, bias = x.weight - factor * x.weight_sum, x.bias - factor * x.bias_sum
        stepped.append(FastLayer(weight, bias, torch.zeros_like(weight), torch.zeros_like(bias)))
    return _where(ends, stepped, layers)


def _read_slot(
    x: _Tokens, layers: Sequence[FastLayer], norm: Norm | None, *, whole: bool
) -> tuple[Tensor, tuple[FastLayer, ...]]:
    """Return the outputs of a slot's tokens, and the state with their gradients added to its sums."""
    inputs, gradients = _gradients(x.k, x.v - x.k, layers, norm)
    after = []
    y = x.q
    for number, (layer, key, gradient) in enumerate(zip(layers, inputs, gradients, strict=True)):
        scaled = x.rate * gradient
        y = y if number == 0 else F.gelu(y, approximate="tanh")
        if whole:  # a batch, dual form
            step = (y @ key.mT + 1).tril() @ scaled + y @ layer.weight_sum + layer.bias_sum
            y = y @ layer.weight + layer.bias - x.factor * step
            sums = layer.weight_sum + key.mT @ scaled, layer.bias_sum + scaled.sum(2, keepdim=True)
        else:  # one token, primal form
            sums = layer.weight_sum + key.mT * scaled, layer.bias_sum + scaled
            y = y @ (layer.weight - x.factor * sums[0]) + layer.bias - x.factor * sums[1]
        after.append(FastLayer(layer.weight, layer.bias, *sums))
    return x.q + _normed(y, norm), tuple(after)


def _gradients(
    k: Tensor, target: Tensor, layers: Sequence[FastLayer], norm: Norm | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the inputs of the layers for keys, and the gradients of the loss by the layers' outputs.

    The layers are those of the start of the batch, for all its tokens.
    """
    inputs, outputs = [k], []
    for layer in layers:
        outputs.append(inputs[-1] @ layer.weight + layer.bias)
        inputs.append(F.gelu(outputs[-1], approximate="tanh"))
    gradient = _loss_gradient(outputs[-1], target, norm)
    gradients = [gradient]
    for layer, output in zip(reversed(layers[1:]), reversed(outputs[:-1]), strict=True):
        gradient = (gradient @ layer.weight.mT) * _gelu_slope(output)
        gradients.append(gradient)
    return inputs[:-1], gradients[::-1]


def _normed(y: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return y
    weight, bias = norm.weight.to(y.dtype)[:, None], norm.bias.to(y.dtype)[:, None]
    return F.layer_norm(y, y.shape[-1:], eps=norm.eps) * weight + bias


def _loss_gradient(y: Tensor, target: Tensor, norm: Norm | None) -> Tensor:
    """Return the gradient of |LN(y) - target|^2 / 2 by y."""
    if norm is None:
        return y - target
    weight, bias = norm.weight.to(y.dtype)[:, None], norm.bias.to(y.dtype)[:, None]
    centred = y - y.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    unit = centred * scale
    gradient = (unit * weight + bias - target) * weight
    mean = gradient.mean(-1, keepdim=True)
    return (gradient - mean - unit * (gradient * unit).mean(-1, keepdim=True)) * scale


def _gelu_slope(x: Tensor) -> Tensor:
    """Return the derivative of gelu's tanh approximation."""
    inner = 0.7978845608028654 * (x + 0.044715 * x**3)
    tanh = inner.tanh()
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh.square()) * 0.7978845608028654 * (1 + 3 * 0.044715 * x.square())


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
    slots = -(-(length + (batch - 1 if context else 0)) // batch)
    return 2 * slots * batch * (4 * weights + back + batch * sum(a + b for a, b in pairs))
