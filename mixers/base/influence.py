"""Influence of tokens on outputs: the weights of heads, measured by gradients, and how far back they reach.

The ops with heads are linear in the values, o_n = sum_m w_nm v_m with one w per head. So the gradient of one dimension
of o_n with respect to the same dimension of v_m is the weight w_nm itself, in every paradigm.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...ops.runtime.recording import OpCall, recorded
from .contract import SequenceMixer
from .layer_call import PLAIN_CALL, LayerCall


class ModuleCall(NamedTuple):
    """Arguments and output of a call of a module."""

    x: Tensor
    """First argument of the call."""
    output: Tensor
    """First output of the call."""
    outside: LayerCall
    """What a mixer needs to repeat the call: values from outside, and keys, if they were passed."""


@contextmanager
def record_calls(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, ModuleCall]]:
    """Record the last call of each module while the context is open; yield the calls by the keys of `modules`."""
    calls: dict[int, ModuleCall] = {}

    def hook(number: int) -> Any:
        def store(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
            asked = kwargs.get("call") or PLAIN_CALL
            outside = LayerCall(
                first_values=asked.first_values, token_values=asked.token_values, shared_kv=asked.shared_kv
            )
            calls[number] = ModuleCall(args[0], output[0] if isinstance(output, tuple) else output, outside)

        return store

    handles = [module.register_forward_hook(hook(n), with_kwargs=True) for n, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def weights_of(
    mixer: SequenceMixer, x: Float[Tensor, "B T D"], queries: Sequence[int], call: LayerCall
) -> tuple[Float[Tensor, "B H Q T"], bool]:
    """Return the weights of all tokens in the outputs at the tokens `queries`; then True if they are weights per head.

    If the mixer calls no op with heads, the result has one head. Its weights are norms of the gradient of the output
    with respect to the mixer's input; the dimensions of the output are summed with random signs from a fixed seed.

    Args:
        mixer: the mixer, whose parameters need no gradients.
        x: the segment.
        queries: indices, from 0, of the Q tokens whose outputs are examined.
        call: values from outside, and keys, if the mixer takes them.
    """
    x = x.detach().requires_grad_()
    if (kv := call.shared_kv) is not None:  # weights are gradients of the values
        call = call._replace(shared_kv=kv._replace(v=kv.v.detach().requires_grad_()))
    with torch.enable_grad(), recorded() as calls:
        y = mixer(x, call=call).y
    per_call = [weights for call in calls if (weights := head_weights(call, x.shape[1], queries)) is not None]
    if per_call:
        return torch.cat(per_call, dim=1), True
    signs = torch.randint(2, y.shape[2:], generator=torch.Generator().manual_seed(0)).to(y) * 2 - 1
    rows = [_gradient(y[:, n] @ signs, x).norm(dim=-1) for n in queries]
    return torch.stack(rows, dim=1)[:, None], False


def head_weights(call: OpCall, length: int, queries: Sequence[int]) -> Float[Tensor, "B H Q T"] | None:
    """Return the weights of a recorded op call over `length` tokens; None if the call has no values or no gradients."""
    if not call.v.shape[-1] or not call.output.requires_grad or not call.v.requires_grad:
        return None
    heads = call.output.shape[2]
    groups = call.v.shape[2]
    steps = call.output.shape[1] // length
    values_per_token = call.v.shape[1] // length
    rows = []
    for n in queries:
        first = call.output[:, n * steps + steps - 1, :, 0].unflatten(1, (groups, -1))  # [B G H/G]
        # heads that share a value need one backward pass each
        parts = [_gradient(first[..., j].sum(), call.v)[..., 0] for j in range(heads // groups)]
        weights = torch.stack(parts, dim=-1).flatten(2)  # [B T*values_per_token H]
        rows.append(weights.unflatten(1, (length, values_per_token)).sum(2))
    return torch.stack(rows, dim=1).permute(0, 3, 1, 2)


def reach_of(weights: Float[Tensor, "B H Q T"], queries: Sequence[int]) -> Float[Tensor, " H"]:
    """Return for each head the mean distance in tokens from a query to all tokens, weighted by absolute weights."""
    size = weights.abs().double()
    position = torch.arange(weights.shape[-1], device=weights.device)
    distance = torch.tensor(list(queries), device=weights.device)[:, None] - position
    return ((size * distance).sum(-1) / size.sum(-1).clamp(min=1e-30)).mean((0, 2))


def _gradient(y: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of y.sum() with respect to x; zero if y does not depend on x."""
    (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient.detach()
