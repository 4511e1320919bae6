"""Context parallelism: the tokens of one sequence, or of one packed row, lie on several ranks in equal segments.

Notation: n ranks, T tokens a rank; rank r has the tokens r T to (r+1) T - 1 of n T. An op with a context takes the
rank's own tokens, borders and initial states of the whole row, and returns the outputs of the rank's own tokens and the
final state of the whole row. How segments compose is a family's own:

    decay, delta    S_r = M_r S_{r-1} + U_r      every rank gathers all (M, U): one state each, whatever T
    short conv      the last W-1 inputs of the ranks before
    softmax         every rank gathers all keys and values
    long conv       every rank gathers all inputs

Every rank's graph uses every gathered tensor: backward sums up over ranks what each is owed, and waits for all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..mixers.positions import document_of_token
from .packing import require_borders


@dataclass(frozen=True)
class Context:
    """The ranks that share a row of tokens, in their order; each has a segment of the same length."""

    name: str
    """Of the process group: a compiler knows names, and no groups."""
    rank: int
    """This process, from 0: it has the segment of that number."""
    size: int
    """Ranks."""

    @classmethod
    def of(cls, group: "dist.ProcessGroup") -> "Context":
        """That of a process group."""
        return cls(group.group_name, group.rank(), group.size())

    @property
    def group(self) -> "dist.ProcessGroup":
        """The process group."""
        return _group(self.name)

    def start(self, length: int) -> int:
        """Tokens of the row before this rank's segment of `length` tokens."""
        return self.rank * length

    def part(self, row: Tensor) -> Tensor:
        """This rank's segment of a whole row of tokens: [B n*T ..] -> [B T ..]."""
        return row.chunk(self.size, dim=1)[self.rank]

    def gather(self, x: Tensor) -> Tensor:
        """A tensor of every rank, one behind another: [..] -> [n ..]. Their shapes must agree."""
        return gather_op(x, self.size, self.name)

    def gather_tokens(self, x: Tensor) -> Tensor:
        """The whole row from its segments: [B T ..] -> [B n*T ..]."""
        return self.gather(x).transpose(0, 1).flatten(1, 2)

    # ---- packed documents, whose borders are those of the whole row

    def borders(self, cu_seqlens: Tensor | None, length: int) -> Tensor | None:
        """The documents' borders inside this rank's segment, from 0 to `length`; those of other ranks are empty.

        Raises:
            SeqmixError: they are no borders of the whole row.
        """
        if cu_seqlens is None:
            return None
        require_borders(cu_seqlens, self.size * length)
        return (cu_seqlens - self.start(length)).clamp(0, length)

    def first_document(self, cu_seqlens: Tensor, length: int) -> Tensor:
        """The document of this segment's first token, [1]."""
        return document_of_token(cu_seqlens, 1, self.start(length))

    def last_documents(self, cu_seqlens: Tensor, length: int) -> Tensor:
        """The document of the last token of each rank, [n]."""
        return document_of_token(cu_seqlens, self.size * length)[length - 1 :: length]

    def last_tokens(self, cu_seqlens: Tensor, length: int) -> Tensor:
        """Which of this segment's tokens are of the document that it leaves unfinished, [T]."""
        document = document_of_token(cu_seqlens, length, self.start(length))
        return document == document[-1]

    def last_row(self, rows: Tensor, cu_seqlens: Tensor | None, length: int) -> Tensor:
        """Of rows for documents, that of the one which this segment leaves unfinished, [1 ..]; else all rows."""
        if cu_seqlens is None:
            return rows
        return rows.index_select(0, self.last_documents(cu_seqlens, length)[self.rank : self.rank + 1])

    def continued(self, row: Tensor, rows: Tensor, cu_seqlens: Tensor | None, length: int) -> Tensor:
        """Rows for documents, with `row` for the one that this segment goes on with; else `row` itself."""
        if cu_seqlens is None:
            return row
        document = torch.arange(len(rows), device=rows.device).view(-1, *[1] * (rows.ndim - 1))
        return torch.where(document == self.first_document(cu_seqlens, length), row, rows)

    def behind(self, row: Tensor, rows: Tensor, cu_seqlens: Tensor | None, length: int) -> Tensor:
        """The same where `row` is behind the rank before, whose last document may end at this segment's start."""
        if cu_seqlens is None:
            return row
        document, last = self.first_document(cu_seqlens, length), self.last_documents(cu_seqlens, length)
        own = rows.index_select(0, document)
        return self.continued(torch.where(last[self.rank - 1] == document, row, own), rows, cu_seqlens, length)

    # ---- states

    def entry(
        self,
        transition: Tensor,
        written: Tensor,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        length: int,
        apply: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The state in front of this rank's segment, of a recurrence whose segments are S -> M S + U.

        Args:
            transition: M of this segment; of packed documents, that of the one it leaves unfinished (one row).
            written: U, likewise: the state behind the segment from none before it.
            initial_state: in front of the whole row (a row a document); None means zero.
            cu_seqlens: borders of the whole row.
            length: tokens of a segment.
            apply: M S.
        """
        transitions, states = self.gather(transition), self.gather(written)
        used = torch.arange(self.size, device=written.device) < self.rank
        if cu_seqlens is None:
            state = rows = torch.zeros_like(written) if initial_state is None else initial_state.to(written.dtype)
        else:
            own = self.first_document(cu_seqlens, length)
            used = used & (self.last_documents(cu_seqlens, length) == own)
            shape = (len(cu_seqlens) - 1, *written.shape[1:])
            rows = written.new_zeros(shape) if initial_state is None else initial_state.to(written.dtype)
            state = rows.index_select(0, own)
        for i in range(self.size):
            state = torch.where(used[i], apply(transitions[i], state) + states[i], state)
        return self.continued(state, rows, cu_seqlens, length)

    def final(self, state: Tensor, cu_seqlens: Tensor | None, length: int) -> Tensor:
        """The state behind the whole row, from those behind each rank's segment: of each row, its last rank's."""
        states = self.gather(state)
        if cu_seqlens is None:
            return states[-1]
        # a document without tokens is on no rank, and has its initial state on all of them
        rank = ((cu_seqlens[1:] - 1) // length).clamp(min=0)
        return states[rank, torch.arange(len(rank), device=rank.device)]


@torch.library.custom_op("seqmix::all_gather", mutates_args=())
def gather_op(x: Tensor, size: int, group: str) -> Tensor:
    """A tensor of each of the group's `size` ranks, [..] -> [n ..].

    Torch's own differentiable collective hands an unfinished tensor to custom ops, which read it.
    """
    whole = x.new_empty(size, *x.shape)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(whole.view(-1), x.reshape(-1), group=_group(group))
    return whole


@gather_op.register_fake
def _(x: Tensor, size: int, group: str) -> Tensor:
    return x.new_empty(size, *x.shape)


@torch.library.custom_op("seqmix::reduce_scatter", mutates_args=())
def scatter_op(x: Tensor, group: str) -> Tensor:
    """The sum over ranks of this rank's entry, [n ..] -> [..]."""
    own = x.new_empty(x.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(own.view(-1), x.reshape(-1), group=_group(group))
    return own


@scatter_op.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape[1:])


def _group(name: str) -> "dist.ProcessGroup":
    """The process group of a name: an op takes no object."""
    resolve: Any = vars(dist.distributed_c10d)["_resolve_process_group"]  # torch's own ops use it, and export it not
    return resolve(name)


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, ctx.group = inputs


def _gather_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return scatter_op(gradient, ctx.group), None, None


gather_op.register_autograd(_gather_backward, setup_context=_setup_gather)
