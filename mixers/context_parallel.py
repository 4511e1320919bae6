"""Context parallelism for any mixer: the contract f(x1 ++ x2, s) = f(x1, s) ++ f(x2, s1) says that the state s1 is all
that a rank needs of the ranks before it. Ranks run one after another: each sends the state to the next, and backward
sends its gradient back.
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.runtime.call import Call
from ..ops.runtime.context_parallel import ContextParallel
from .state import from_dict, map_state, to_dict
from .traits import ContractError, Traits


class Mixer(Protocol):
    """The part of a `SequenceMixer` that is needed here."""

    kind: Any
    traits: Traits

    def init_state(self, batch_size: int) -> Any:
        """The initial state."""
        ...

    def mix(self, x: Tensor, call: Call) -> tuple[Any, ...]:
        """What it computes."""
        ...


def mix_in_turn(mixer: Mixer, x: Tensor, call: Call) -> tuple[Any, ...]:
    """What `mix` computes of this rank's segment, from the final state of the ranks before it.

    Raises:
        ContractError: the state grows, so that ranks have states of different shapes.
    """
    cp = call.cp_group
    documents = call.documents
    length = x.shape[1]
    assert cp is not None
    if mixer.traits.state == "growing":
        raise ContractError(
            f"{mixer.kind} has no context parallelism: its state grows with the sequence length, and its "
            "`mix` does not read `call.cp_group`; set distributed.context_parallel to 1, or choose another mixer"
        )
    alone = call._replace(documents=cp.local(documents, length), cp_group=None, return_state=True)
    before = mixer.init_state(alone.rows(x.shape[0])) if call.state is None else call.state
    anchor = x.new_zeros((), requires_grad=torch.is_grad_enabled())  # so that backward comes by, whatever x is
    if cp.rank > 0:
        leaves = to_dict(before)
        likes = [cp.last_row(leaf, documents) for leaf in leaves.values()]
        received = zip(leaves.items(), _Receive.apply(anchor, cp, *likes), strict=True)
        before = from_dict(before, {name: cp.after(row, leaf, documents, length) for (name, leaf), row in received})
    y, after, *values = mixer.mix(x, alone._replace(state=before))
    if after is None:
        raise ContractError(f"{mixer.kind}: mix has to return a state where one is wanted, and returned None")
    if cp.rank < cp.size - 1:
        y = _Send.apply(y, anchor, cp, *(cp.last_row(leaf, documents) for leaf in to_dict(after).values()))
    final = map_state(lambda leaf: cp.final(leaf, documents, length), after) if call.return_state else None
    return (y, final, *values)


class _Receive(torch.autograd.Function):
    """Tensors like the given ones from the rank before; backward sends it their gradients."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, cp: ContextParallel, *likes: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        ctx.cp = cp
        received = tuple(torch.empty_like(like, memory_format=torch.contiguous_format) for like in likes)
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
    """y as it is, and tensors to the next rank; backward receives their gradients from it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, cp: ContextParallel, *leaves: Tensor) -> Tensor:  # noqa: ARG004
        ctx.cp = cp
        ctx.likes = [leaf.detach() for leaf in leaves]
        for leaf in leaves:
            dist.send(leaf.detach().contiguous(), group=cp.group, group_dst=cp.rank + 1)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        received: list[Tensor | None] = []
        for like in ctx.likes:
            if like.is_floating_point():
                owed = torch.empty_like(like, memory_format=torch.contiguous_format)
                dist.recv(owed, group=ctx.cp.group, group_src=ctx.cp.rank + 1)
                received.append(owed)
            else:
                received.append(None)
        return grad_outputs[0], None, None, *received
