"""Sequential context parallelism, for any mixer whose state has a constant size.

By the contract, f(x1 ++ x2, s) = f(x1, s) ++ f(x2, s1): a rank needs nothing but the state s1 of the ranks before it.
Ranks run one after another. Each sends its state to the next rank, and the backward pass sends the gradient back.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ...ops.runtime.call import Call
from ...ops.runtime.context_parallel import ContextParallel
from .layer_call import MixResult
from .state import from_dict, map_state, to_dict
from .traits import ContractError, Traits


class Mixer(Protocol):
    """Interface of `SequenceMixer` that sequential context parallelism needs."""

    kind: Any
    traits: Traits

    def init_state(self, batch_size: int) -> Any:
        """Return the initial state."""
        ...

    def mix(self, x: Tensor, call: Call) -> tuple[Any, ...]:
        """Compute the output and final state of a segment."""
        ...


def mix_sequentially(mixer: Mixer, x: Tensor, call: Call) -> MixResult[Any]:
    """Call `mix` on this rank's segment, starting from the final state of the ranks before it.

    Returns:
        The result of `mix` for this rank's tokens, with the final state of the whole row (None unless requested).

    Raises:
        ContractError: the state grows, so that ranks would have states of different shapes; or `mix` returns no state.
    """
    cp = call.cp_group
    documents = call.documents
    length = x.shape[1]
    assert cp is not None
    require_sequential(mixer.traits, mixer.kind)
    local_call = call._replace(documents=cp.local(documents, length), cp_group=None, return_state=True)
    before = mixer.init_state(local_call.rows(x.shape[0])) if call.state is None else call.state
    # makes backward reach _Receive, even if x needs no gradient
    anchor = x.new_zeros((), requires_grad=torch.is_grad_enabled())
    if cp.rank > 0:
        leaves = to_dict(before)
        templates = [cp.last_row(leaf, documents) for leaf in leaves.values()]
        received = zip(leaves.items(), _Receive.apply(anchor, cp, *templates), strict=True)
        before = from_dict(before, {name: cp.after(row, leaf, documents, length) for (name, leaf), row in received})
    y, after, *others = mixer.mix(x, local_call._replace(state=before))
    if after is None:
        raise ContractError(f"{mixer.kind}: mix must return a state when call.return_state is True, got None")
    if cp.rank < cp.size - 1:
        y = _Send.apply(y, anchor, cp, *(cp.last_row(leaf, documents) for leaf in to_dict(after).values()))
    final = map_state(lambda leaf: cp.final(leaf, documents, length), after) if call.return_state else None
    return MixResult(y, final, *others)


def require_sequential(traits: Traits, kind: str) -> None:
    """Raise ContractError if a mixer's state cannot be sent from rank to rank."""
    if traits.state == "growing":
        raise ContractError(
            f"{kind} does not support context parallelism: its state grows with the sequence length, and its "
            "`mix` does not read `call.cp_group`. Set distributed.context_parallel to 1, or choose another mixer"
        )


class _Receive(torch.autograd.Function):
    """Receive tensors shaped like the templates from the previous rank; backward sends their gradients to it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, cp: ContextParallel, *templates: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        ctx.cp = cp
        received = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in templates)
        for tensor in received:
            dist.recv(tensor, group=cp.group, group_src=cp.rank - 1)
        ctx.mark_non_differentiable(*(tensor for tensor in received if not tensor.is_floating_point()))
        return received

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        for gradient in grad_outputs:
            if gradient.is_floating_point():
                dist.send(gradient.contiguous(), group=ctx.cp.group, group_dst=ctx.cp.rank - 1)
        return None, None, *(None for _ in grad_outputs)


class _Send(torch.autograd.Function):
    """Return y, and send tensors to the next rank; backward receives their gradients from it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, cp: ContextParallel, *leaves: Tensor) -> Tensor:  # noqa: ARG004
        ctx.cp = cp
        ctx.templates = [leaf.detach() for leaf in leaves]
        for leaf in leaves:
            dist.send(leaf.detach().contiguous(), group=cp.group, group_dst=cp.rank + 1)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        received: list[Tensor | None] = []
        for template in ctx.templates:
            if template.is_floating_point():
                gradient = torch.empty_like(template, memory_format=torch.contiguous_format)
                dist.recv(gradient, group=ctx.cp.group, group_src=ctx.cp.rank + 1)
                received.append(gradient)
            else:
                received.append(None)
        return grad_outputs[0], None, None, *received
