"""Which tokens an output reads, and how far back: weights of heads, measured by gradients.

The ops with heads are linear in the values, o_n = sum_m w_nm v_m with one w per head, so the gradient of one dimension
of o_n with respect to that of v_m is the weight: exactly that of the parallel paradigm, whatever computed it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..ops.runtime.recording import Recorded, recorded
from .contract import SequenceMixer


class Seen(NamedTuple):
    """A call of a module."""

    x: Tensor
    """Its first argument."""
    output: Tensor
    """Its first output."""
    options: dict[str, Any]
    """Of a mixer: what it has to be given beside x, the values of the first layer."""


@contextmanager
def captured(modules: Mapping[int, nn.Module]) -> Iterator[dict[int, Seen]]:
    """By number of a module, its last call while the context is open."""
    found: dict[int, Seen] = {}

    def hook(number: int) -> Any:
        def store(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
            options = {name: kwargs[name] for name in ("first_values",) if kwargs.get(name) is not None}
            found[number] = Seen(args[0], output[0] if isinstance(output, tuple) else output, options)

        return store

    handles = [module.register_forward_hook(hook(n), with_kwargs=True) for n, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def weights_of(
    mixer: SequenceMixer, x: Float[Tensor, "B T D"], queries: Sequence[int], **options: Any
) -> tuple[Float[Tensor, "B H Q T"], bool]:
    """The weights with which outputs at some tokens read all tokens, and whether they are those of an op's heads.

    Without an op with heads there is one head: the norms of the gradients of the output with respect to the mixer's
    inputs, summed over the output's dimensions with random signs (fixed by a seed). `queries` are indices of tokens,
    from 0; parameters need no gradients.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad(), recorded() as calls:
        y = mixer(x, **options)[0]
    found = [weights for call in calls if (weights := head_weights(call, x.shape[1], queries)) is not None]
    if found:
        return torch.cat(found, dim=1), True
    signs = torch.randint(2, y.shape[2:], generator=torch.Generator().manual_seed(0)).to(y) * 2 - 1
    rows = [_gradient(y[:, n] @ signs, x).norm(dim=-1) for n in queries]
    return torch.stack(rows, dim=1)[:, None], False


def head_weights(call: Recorded, length: int, queries: Sequence[int]) -> Float[Tensor, "B H Q T"] | None:
    """The weights of a recorded call of an op over `length` tokens; None where it reads no values of its own."""
    if not call.v.shape[-1] or not call.output.requires_grad or not call.v.requires_grad:
        return None
    heads = call.output.shape[2]
    groups = call.v.shape[2]
    steps = call.output.shape[1] // length
    read = call.v.shape[1] // length
    rows = []
    for n in queries:
        first = call.output[:, n * steps + steps - 1, :, 0].unflatten(1, (groups, -1))  # [B G H/G]
        # heads that share a value are told apart by as many backward passes
        parts = [_gradient(first[..., j].sum(), call.v)[..., 0] for j in range(heads // groups)]
        weights = torch.stack(parts, dim=-1).flatten(2)  # [B T*read H]
        rows.append(weights.unflatten(1, (length, read)).sum(2))
    return torch.stack(rows, dim=1).permute(0, 3, 1, 2)


def reach_of(weights: Float[Tensor, "B H Q T"], queries: Sequence[int]) -> Float[Tensor, " H"]:
    """The mean distance from a query to what it reads, in tokens, by absolute weight; the mean of the queries."""
    size = weights.abs().double()
    at = torch.arange(weights.shape[-1], device=weights.device)
    distance = torch.tensor(list(queries), device=weights.device)[:, None] - at
    return ((size * distance).sum(-1) / size.sum(-1).clamp(min=1e-30)).mean((0, 2))


def _gradient(y: Tensor, x: Tensor) -> Tensor:
    """The gradient of the sum of y; zero where x takes no part."""
    (found,) = torch.autograd.grad(y.sum(), x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if found is None else found.detach()
