"""Context parallelism: one sequence, or one packed row, is split over several processes in equal segments.

Notation: n processes, T tokens each; rank r has the tokens r T to (r+1) T - 1 of n T. With a context-parallel group,
an op takes the tokens of its own rank, but documents and initial states of the whole row. It returns the outputs of its
own tokens and the final state of the whole row. Families compose segments in different ways:

    decay, delta,
    scan            S_r = M_r S_{r-1} + U_r      every rank gathers all (M, U): one state each, for any T
    short conv      every rank needs the last W-1 inputs of the preceding ranks
    softmax         keys and values of the preceding ranks arrive one block at a time, in the backward pass too
                    (attention/ring.py); with an initial or a final state, every rank gathers all of them
    long conv       every rank gathers all inputs

Every rank's graph uses every gathered tensor: the backward pass is a reduce-scatter of their gradients and waits for
all ranks.
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
    """An ordered group of processes that share a row of tokens, in segments of equal length."""

    name: str
    """Name of the process group; compilers can trace a name, but not a group."""
    rank: int
    """Index of this process, from 0, and of its segment."""
    size: int
    """Number of processes."""

    @classmethod
    def of(cls, group: "dist.ProcessGroup") -> "ContextParallel":
        """Build the group from a process group of torch.distributed."""
        return cls(group.group_name, group.rank(), group.size())

    @property
    def group(self) -> "dist.ProcessGroup":
        """The process group."""
        return _group(self.name)

    def start(self, length: int) -> int:
        """Return the number of tokens in the row before this rank's segment of `length` tokens."""
        return self.rank * length

    def part(self, row: Tensor) -> Tensor:
        """Return this rank's segment of a whole row of tokens: [B n*T ..] -> [B T ..]."""
        return row.chunk(self.size, dim=1)[self.rank]

    def gather(self, x: Tensor) -> Tensor:
        """Stack the tensors of all ranks, which must have one shape: [..] -> [n ..]."""
        return GATHER(_Gather(x, self.size, self.name))[0]

    def gather_tokens(self, x: Tensor) -> Tensor:
        """Gather the whole row of tokens from its segments: [B T ..] -> [B n*T ..]."""
        return self.gather(x).transpose(0, 1).flatten(1, 2)

    def exchange(
        self, sent: Sequence[Tensor], like: Sequence[Tensor], distance: int
    ) -> tuple[list[Tensor], list["dist.Work"]]:
        """Start sending to the rank `distance` after this one, and receiving from the rank `distance` before it.

        Args:
            sent: tensors to send; they must not change until the returned works are complete.
            like: tensors with the shapes and dtypes of the tensors to receive.
            distance: number of ranks between sender and receiver.

        Returns:
            The received tensors (empty list if there is no such rank), and the works to wait for, which fill them.
        """
        calls: list[dist.P2POp] = []
        received: list[Tensor] = []
        if 0 <= (after := self.rank + distance) < self.size:
            calls += [dist.P2POp(dist.isend, x, group=self.group, group_peer=after) for x in sent if x.numel()]
        if 0 <= (before := self.rank - distance) < self.size:
            received = [torch.empty_like(x) for x in like]
            calls += [dist.P2POp(dist.irecv, x, group=self.group, group_peer=before) for x in received if x.numel()]
        return received, dist.batch_isend_irecv(calls) if calls else []

    # ---- packed documents: their boundaries refer to the whole row

    def local(self, documents: Documents | None, length: int) -> Documents | None:
        """Return the documents with boundaries clipped to this rank's segment, from 0 to `length`.

        Documents outside the segment become empty.
        """
        if documents is None:
            return None
        start = self.start(length)
        boundaries = documents.boundaries
        if boundaries is not None:
            boundaries = tuple(min(max(boundary - start, 0), length) for boundary in boundaries)
        return Documents((documents.cu_seqlens - start).clamp(0, length), documents.of_token, boundaries)

    def whole(self, documents: Documents | None, length: int) -> Documents | None:
        """Return the documents with `of_token` for the whole row, not only this rank's segment of `length` tokens."""
        if documents is None:
            return None
        return documents._replace(of_token=document_of_token(documents.cu_seqlens, self.size * length))

    def last_documents(self, documents: Documents, length: int) -> Tensor:
        """Return the document index of each rank's last token, [n]."""
        return document_of_token(documents.cu_seqlens, self.size * length)[length - 1 :: length]

    def last_row(self, rows: Tensor, documents: Documents | None) -> Tensor:
        """Return the entry of `rows` (one per document) for the document of this segment's last token, [1 ..].

        Returns `rows` itself if `documents` is None.
        """
        return rows if documents is None else rows.index_select(0, documents.of_token[-1:])

    def continued(self, row: Tensor, rows: Tensor, documents: Documents | None) -> Tensor:
        """Return `rows` (one per document), in which `row` replaces that of the document in which this segment starts.

        Returns `row` itself if `documents` is None.
        """
        if documents is None:
            return row
        document = torch.arange(len(rows), device=rows.device).view(-1, *[1] * (rows.ndim - 1))
        return torch.where(document == documents.of_token[:1], row, rows)

    def after(self, row: Tensor, rows: Tensor, documents: Documents | None, length: int) -> Tensor:
        """Return the states before this segment (one per document), given the state `row` after the preceding segment.

        `rows` are the states before the whole row. `row` replaces the state of the document in which this segment
        starts, unless the document begins at the segment's first token.
        """
        if documents is None:
            return row
        first = documents.of_token[:1]
        last = self.last_documents(documents, length)
        row = torch.where(last[self.rank - 1] == first, row, rows.index_select(0, first))
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
        """Return the state before this rank's segment, for a recurrence whose segments map S to M S + U.

        Args:
            transition: M of this segment; for packed documents, one row: that of the document of its last token.
            written: U of this segment; for packed documents, that of the same document.
            initial_state: state before the whole row; None means zero.
            documents: documents of the whole row, or None.
            length: tokens of the segment.
            apply: computes M S from (M, S).
            add: computes the sum from (M S, U).
        """
        transitions = self.gather(transition)
        states = self.gather(written)
        used = torch.arange(self.size, device=written.device) < self.rank
        if documents is None:
            state = rows = torch.zeros_like(written) if initial_state is None else initial_state.to(written.dtype)
        else:
            first = documents.of_token[:1]
            used = used & (self.last_documents(documents, length) == first)
            shape = (documents.number, *written.shape[1:])
            rows = written.new_zeros(shape) if initial_state is None else initial_state.to(written.dtype)
            state = rows.index_select(0, first)
        for i in range(self.size):
            state = torch.where(used[i], add(apply(transitions[i], state), states[i]), state)
        return self.continued(state, rows, documents)

    def final(self, state: Tensor, documents: Documents | None, length: int) -> Tensor:
        """Return the state after the whole row, from the states after each rank's segment.

        Each packed document takes its state from the rank that has its last token.
        """
        states = self.gather(state)
        if documents is None:
            return states[-1]
        # an empty document is on no rank, but all ranks hold its initial state: any of them will do
        rank = ((documents.cu_seqlens[1:] - 1) // length).clamp(min=0)
        return states[rank, torch.arange(len(rank), device=rank.device)]


class _Gather(NamedTuple):
    x: Tensor
    size: int
    group: str


def _allocate(call: _Gather) -> tuple[Tensor]:
    return (call.x.new_empty(call.size, *call.x.shape),)


def _gather(call: _Gather) -> tuple[Tensor]:
    """Gather a tensor from each of the group's `size` ranks, [..] -> [n ..].

    Torch's own differentiable collective is unsuitable: it hands an unfinished tensor to custom ops, which read it.
    """
    (whole,) = _allocate(call)
    # torch 2.13 renamed all_gather_into_tensor to all_gather_single
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole.view(-1), call.x.reshape(-1), group=_group(call.group))
    return (whole,)


def _reduce_scatter(call: _Gather, gradients: Gradients) -> dict[str, Tensor]:
    """Sum the gradients of this rank's tensor over all ranks, [n ..] -> [..]."""
    (d_whole,) = gradients.outputs
    assert d_whole is not None
    d_x = d_whole.new_empty(d_whole.shape[1:])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(d_x.view(-1), d_whole.reshape(-1), group=_group(call.group))
    return {"x": d_x}


def _group(name: str) -> "dist.ProcessGroup":
    """Return the process group with this name; custom ops accept a name, but not a group."""
    # torch's own ops use this function, but torch does not export it
    resolve: Any = vars(dist.distributed_c10d)["_resolve_process_group"]
    return resolve(name)


GATHER = Op("all_gather", _Gather, fake=_allocate, forward=_gather, backward=_reduce_scatter, outputs=1)
