"""Context parallelism: one sequence, or one packed row, is split over several processes in equal segments.

Notation: n processes, T tokens each; rank r has the tokens r T to (r+1) T - 1 of n T. An op with a context-parallel
group takes the rank's own tokens, documents and initial states of the whole row, and returns the outputs of the rank's
own tokens and the final state of the whole row. How segments compose is a family's own:

    decay, delta,
    scan            S_r = M_r S_{r-1} + U_r      every rank gathers all (M, U): one state each, whatever T
    short conv      the last W-1 inputs of the ranks before
    softmax         keys and values of the ranks before come one block at a time, backward too (softmax/ring.py);
                    where a state is given or wanted, every rank gathers all of them
    long conv       every rank gathers all inputs

Every rank's graph uses every gathered tensor: backward is a reduce-scatter of their gradients, and waits for all ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .custom_op import Gradients, Op
from .packing import Documents, document_of_token


@dataclass(frozen=True)
class ContextParallel:
    """The processes that share a row of tokens, in their order; each has a segment of the same length."""

    name: str
    """Of the process group: a compiler traces names, not groups."""
    rank: int
    """This process, from 0: it has the segment of that number."""
    size: int
    """Processes."""

    @classmethod
    def of(cls, group: "dist.ProcessGroup") -> "ContextParallel":
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
        """A tensor of every rank, stacked: [..] -> [n ..]. Their shapes must agree."""
        return GATHER(_Gather(x, self.size, self.name))[0]

    def gather_tokens(self, x: Tensor) -> Tensor:
        """The whole row from its segments: [B T ..] -> [B n*T ..]."""
        return self.gather(x).transpose(0, 1).flatten(1, 2)

    def exchange(
        self, sent: Sequence[Tensor], like: Sequence[Tensor], distance: int
    ) -> tuple[list[Tensor], list["dist.Work"]]:
        """Send to the rank that is `distance` after this one, and receive tensors like others from the one as far
        before (none where there is no such rank); what was sent may change, and what is received is there, when the
        works are done.
        """
        calls: list[dist.P2POp] = []
        received: list[Tensor] = []
        if 0 <= (after := self.rank + distance) < self.size:
            calls += [dist.P2POp(dist.isend, x, group=self.group, group_peer=after) for x in sent if x.numel()]
        if 0 <= (before := self.rank - distance) < self.size:
            received = [torch.empty_like(x) for x in like]
            calls += [dist.P2POp(dist.irecv, x, group=self.group, group_peer=before) for x in received if x.numel()]
        return received, dist.batch_isend_irecv(calls) if calls else []

    # ---- packed documents, whose boundaries are those of the whole row

    def local(self, documents: Documents | None, length: int) -> Documents | None:
        """The documents inside this rank's segment, whose boundaries go from 0 to `length`; others are empty."""
        if documents is None:
            return None
        start = self.start(length)
        boundaries = documents.boundaries
        if boundaries is not None:
            boundaries = tuple(min(max(boundary - start, 0), length) for boundary in boundaries)
        return Documents((documents.cu_seqlens - start).clamp(0, length), documents.of_token, boundaries)

    def whole(self, documents: Documents | None, length: int) -> Documents | None:
        """The documents of all tokens of the row, not only of this rank's segment of `length` tokens."""
        if documents is None:
            return None
        return documents._replace(of_token=document_of_token(documents.cu_seqlens, self.size * length))

    def last_documents(self, documents: Documents, length: int) -> Tensor:
        """The document of the last token of each rank, [n]."""
        return document_of_token(documents.cu_seqlens, self.size * length)[length - 1 :: length]

    def last_row(self, rows: Tensor, documents: Documents | None) -> Tensor:
        """Of rows for documents, that of the one which this segment leaves unfinished, [1 ..]; else all rows."""
        return rows if documents is None else rows.index_select(0, documents.of_token[-1:])

    def continued(self, row: Tensor, rows: Tensor, documents: Documents | None) -> Tensor:
        """Rows for documents, with `row` for the one that this segment continues; else `row` itself."""
        if documents is None:
            return row
        document = torch.arange(len(rows), device=rows.device).view(-1, *[1] * (rows.ndim - 1))
        return torch.where(document == documents.of_token[:1], row, rows)

    def after(self, row: Tensor, rows: Tensor, documents: Documents | None, length: int) -> Tensor:
        """The same where `row` is what the rank before left, whose last document may end at this segment's start."""
        if documents is None:
            return row
        own = documents.of_token[:1]
        last = self.last_documents(documents, length)
        row = torch.where(last[self.rank - 1] == own, row, rows.index_select(0, own))
        return self.continued(row, rows, documents)

    # ---- states

    def entry(
        self,
        transition: Tensor,
        written: Tensor,
        initial_state: Tensor | None,
        documents: Documents | None,
        length: int,
        apply: Callable[[Tensor, Tensor], Tensor],
        add: Callable[[Tensor, Tensor], Tensor] = torch.add,
    ) -> Tensor:
        """The state before this rank's segment of `length` tokens, of a recurrence whose segments are S -> M S + U.

        `transition` is M and `written` U of this segment; of packed documents, those of the one that it leaves
        unfinished (one row). Initial state (None is zero) and documents are the whole row's; `apply` is M S, and
        `add` the sum.
        """
        transitions = self.gather(transition)
        states = self.gather(written)
        used = torch.arange(self.size, device=written.device) < self.rank
        if documents is None:
            state = rows = torch.zeros_like(written) if initial_state is None else initial_state.to(written.dtype)
        else:
            own = documents.of_token[:1]
            used = used & (self.last_documents(documents, length) == own)
            shape = (documents.number, *written.shape[1:])
            rows = written.new_zeros(shape) if initial_state is None else initial_state.to(written.dtype)
            state = rows.index_select(0, own)
        for i in range(self.size):
            state = torch.where(used[i], add(apply(transitions[i], state), states[i]), state)
        return self.continued(state, rows, documents)

    def final(self, state: Tensor, documents: Documents | None, length: int) -> Tensor:
        """The state after the whole row, from those after each rank's segment: of each row, its last rank's."""
        states = self.gather(state)
        if documents is None:
            return states[-1]
        # a document without tokens is on no rank, and has its initial state on all of them
        rank = ((documents.cu_seqlens[1:] - 1) // length).clamp(min=0)
        return states[rank, torch.arange(len(rank), device=rank.device)]


class _Gather(NamedTuple):
    x: Tensor
    size: int
    group: str


def _empty(call: _Gather) -> tuple[Tensor]:
    return (call.x.new_empty(call.size, *call.x.shape),)


def _gather(call: _Gather) -> tuple[Tensor]:
    """A tensor of each of the group's `size` ranks, [..] -> [n ..].

    Torch's own differentiable collective hands an unfinished tensor to custom ops, which read it.
    """
    (whole,) = _empty(call)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(whole.view(-1), call.x.reshape(-1), group=_group(call.group))
    return (whole,)


def _reduce_scatter(call: _Gather, gradients: Gradients) -> dict[str, Tensor]:
    """The sum over ranks of this rank's entry, [n ..] -> [..]."""
    (d_whole,) = gradients.outputs
    assert d_whole is not None
    own = d_whole.new_empty(d_whole.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(own.view(-1), d_whole.reshape(-1), group=_group(call.group))
    return {"x": own}


def _group(name: str) -> "dist.ProcessGroup":
    """The process group of a name: an op takes no object."""
    resolve: Any = vars(dist.distributed_c10d)["_resolve_process_group"]  # torch's own ops use it, but do not export it
    return resolve(name)


GATHER = Op("all_gather", _Gather, fake=_empty, forward=_gather, backward=_reduce_scatter, outputs=1)
