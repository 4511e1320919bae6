"""Context parallelism for any mixer: the contract f(x1 ++ x2, s) = f(x1, s) ++ f(x2, s1) says that the state s1 is all
that a rank needs of those before it. It is handed from rank to rank, and its gradient back; each waits for the other.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.context_parallel import Context
from ..ops.paradigm import Paradigm
from .contract import ContractError, S, SequenceMixer
from .state import from_dict, map_state, to_dict


def mix_in_turn(
    mixer: SequenceMixer[S],
    context: Context,
    x: Tensor,
    state: S | None,
    paradigm: Paradigm,
    cu_seqlens: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, S | None]:
    """What `mix` computes of this rank's segment, behind the state of the ranks before it; arguments are `mix`'s.

    Raises:
        ContractError: the state grows, so that ranks have states of different shapes.
    """
    if mixer.traits.state == "growing":
        raise ContractError(
            f"{mixer.kind} cannot share a sequence with other processes: its state grows with the tokens read, and its "
            "`mix` does not read `context`; set distributed.context_parallel to 1, or take another mixer"
        )
    length, borders = x.shape[1], context.borders(cu_seqlens, x.shape[1])
    before = mixer.init_state(x.shape[0] if borders is None else len(borders) - 1) if state is None else state
    anchor = x.new_zeros((), requires_grad=torch.is_grad_enabled())  # so that backward comes by, whatever x is
    if context.rank > 0:
        leaves = to_dict(before)
        likes = [context.last_row(leaf, cu_seqlens, length) for leaf in leaves.values()]
        received = zip(leaves.items(), _Receive.apply(anchor, context, *likes), strict=True)
        before = from_dict(
            before, {name: context.behind(row, leaf, cu_seqlens, length) for (name, leaf), row in received}
        )
    y, after = mixer.mix(x, before, paradigm, borders, True)
    if after is None:
        raise ContractError(f"{mixer.kind}: mix has to return a state where one is wanted, and returned None")
    if context.rank < context.size - 1:
        y = _Send.apply(y, anchor, context, *(context.last_row(x, cu_seqlens, length) for x in to_dict(after).values()))
    return y, map_state(lambda leaf: context.final(leaf, cu_seqlens, length), after) if return_state else None


class _Receive(torch.autograd.Function):
    """Tensors like the given ones from the rank before; backward sends it their gradients."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, context: Context, *likes: Tensor) -> tuple[Tensor, ...]:  # noqa: ARG004
        ctx.context = context
        received = tuple(torch.empty_like(like, memory_format=torch.contiguous_format) for like in likes)
        for tensor in received:
            dist.recv(tensor, group=context.group, group_src=context.rank - 1)
        ctx.mark_non_differentiable(*(tensor for tensor in received if not tensor.is_floating_point()))
        return received

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        for gradient in grad_outputs:
            if gradient.is_floating_point():
                dist.send(gradient.contiguous(), group=ctx.context.group, group_dst=ctx.context.rank - 1)
        return None, None, *(None for _ in grad_outputs)


class _Send(torch.autograd.Function):
    """y as it is, and tensors to the rank behind; backward receives their gradients from it."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, context: Context, *leaves: Tensor) -> Tensor:  # noqa: ARG004
        ctx.context, ctx.likes = context, [leaf.detach() for leaf in leaves]
        for leaf in leaves:
            dist.send(leaf.detach().contiguous(), group=context.group, group_dst=context.rank + 1)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        received: list[Tensor | None] = []
        for like in ctx.likes:
            if like.is_floating_point():
                owed = torch.empty_like(like, memory_format=torch.contiguous_format)
                dist.recv(owed, group=ctx.context.group, group_src=ctx.context.rank + 1)
                received.append(owed)
            else:
                received.append(None)
        return grad_outputs[0], None, None, *received
