"""Network in a state: a perceptron with gelu between its layers, and the gradients of its loss, written out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ...registry import SeqmixError


class Norm(NamedTuple):
    """Layer norm of the memory's output, for queries and for the loss."""

    weight: Float[Tensor, "H D"]
    bias: Float[Tensor, "H D"]
    eps: float


def require_layers(name: str, layers: Sequence[Any], sizes: tuple[int, int, int], bias_rows: int = 0) -> None:
    """Raise a SeqmixError unless layers have N rows and H heads, and map D to D.

    Args:
        name: the op.
        layers: state of the layers; biases may be rows of their matrices.
        sizes: N, H and D.
        bias_rows: number of such rows.
    """
    *rows, width = sizes
    ends = layers[0].weight.shape[2] - bias_rows, layers[-1].weight.shape[3]
    if ends != (width, width) or any(list(x.shape[:2]) != rows for layer in layers for x in layer):
        shapes = ", ".join(str(list(layer.weight.shape)) for layer in layers)
        expected = f"N = {rows[0]}, H = {rows[1]}, D = {width}"
        raise SeqmixError(f"{name} expects layers from D to D with {expected}, got {shapes}")


def normed(y: Tensor, norm: Norm | None) -> Tensor:
    """Return LN(y), or y without a norm."""
    if norm is None:
        return y
    weight, bias = norm.weight.to(y.dtype)[:, None], norm.bias.to(y.dtype)[:, None]
    return F.layer_norm(y, y.shape[-1:], eps=norm.eps) * weight + bias


def loss_gradient(y: Tensor, target: Tensor, norm: Norm | None) -> Tensor:
    """Return the gradient of |LN(y) - target|^2 / 2 by y; of |y - target|^2 / 2 without a norm."""
    if norm is None:
        return y - target
    weight, bias = norm.weight.to(y.dtype)[:, None], norm.bias.to(y.dtype)[:, None]
    centred = y - y.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    unit = centred * scale
    gradient = (unit * weight + bias - target) * weight
    mean = gradient.mean(-1, keepdim=True)
    return (gradient - mean - unit * (gradient * unit).mean(-1, keepdim=True)) * scale


def gelu(x: Tensor) -> Tensor:
    """Return gelu in tanh's approximation."""
    return F.gelu(x, approximate="tanh")


def backpropagate(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, output_gradient: Callable[[Tensor], Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the inputs of all layers, and the gradients of a loss by the outputs of all layers.

    The gradient by a layer's weight is the sum over the tokens of input^T gradient, that by its bias the sum of the
    gradients.

    Args:
        x: inputs of the network, [B H w I].
        weights: matrices of the layers, [B H I O].
        biases: biases of the layers, [B H 1 O]; None for none.
        output_gradient: the gradient of the loss by the output of the network.
    """
    inputs, outputs = [x], []
    for number, weight in enumerate(weights):
        output = inputs[-1] @ weight
        outputs.append(output if biases is None else output + biases[number])
        inputs.append(gelu(outputs[-1]))
    gradient = output_gradient(outputs[-1])
    gradients = [gradient]
    for weight, output in zip(reversed(weights[1:]), reversed(outputs[:-1]), strict=True):
        gradient = (gradient @ weight.mT) * _gelu_slope(output)
        gradients.append(gradient)
    return inputs[:-1], gradients[::-1]


def _gelu_slope(x: Tensor) -> Tensor:
    """Return the derivative of gelu's tanh approximation."""
    inner = 0.7978845608028654 * (x + 0.044715 * x**3)
    tanh = inner.tanh()
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh.square()) * 0.7978845608028654 * (1 + 3 * 0.044715 * x.square())
