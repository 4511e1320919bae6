"""The chunkwise paradigm of any family: parallel inside chunks, recurrent between them; linear in T, memory too.

Notation of family.py, and a chunk of m tokens with entry state S and exit state S'. A product of few rows costs
more to call than to compute: chunks that do not wait for each other are computed in groups of n, and the chunks of a
group, the batch and the heads are one dimension, G = n B H, as batched products want it.

The forward pass saves the chunks' entry states only, of packed documents those of later chunks than the first; the
backward pass recomputes the rest. Only states wait for each other. A ragged last chunk is simply shorter: nothing is
padded. Chunks never straddle a document.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..runtime.custom_op import Gradients, Op
from ..runtime.packing import Stretch
from .family import Recurrence, RecurrenceOutput, Run
from .groups import Group, groups, operand, store


class GroupTokens(NamedTuple):
    """A group's tokens, [G m D] each, in the family's `Chunks.dtype`."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    """[G m 1]."""
    a: Tensor | None
    b: Tensor | None


class ChunkStates(NamedTuple):
    """The states around a group's chunks, and which of them matter."""

    entries: Tensor
    """Before each chunk, [n B H K V]."""
    reading: slice
    """Those of G whose entry state may be other than 0: the last ones."""


class Chunks(ABC):
    """A family's mathematics inside chunks; made once for a call, so that what all chunks share is formed once."""

    most: int
    """Chunks of a group at most."""
    dtype: torch.dtype
    """Of the tokens that they are given, and of the gradients of outputs."""

    @abstractmethod
    def forward(self, group: Group, x: GroupTokens, states: ChunkStates, exits: list[Tensor]) -> Tensor:
        """The output of a group, [G m V]; fills `exits`.

        Args:
            group: which tokens.
            x: the tokens.
            states: before each chunk; those of later chunks are written here, as exits of the ones before.
            exits: the states after each chunk [B H K V], the last of which may be missing: it is not wanted then.
        """

    @abstractmethod
    def backward(
        self, group: Group, x: GroupTokens, d_out: Tensor, states: ChunkStates, d_states: Tensor, leaving: slice
    ) -> Mapping[str, Tensor]:
        """The gradients of a group: of q, k, v, beta, a, b [G m D], and of log_decay if it is wanted.

        That of log_decay is [G m D], or [G] where the decays are fixed: all of a chunk's tokens together.

        Args:
            group: which tokens.
            x: the tokens.
            d_out: of the output, [G m V].
            states: before each chunk.
            d_states: of those states, which are written if a chunk reads its own, and of the state after the last
                chunk, which is given: [n+1 B H K V].
            leaving: those of G that leave a state on which something depends: the first ones.
        """


MakeChunks: TypeAlias = Callable[[Recurrence, bool], Chunks]
"""A family's mathematics for a call; the flag says that the gradient of log_decay is wanted."""


def chunkwise_kernel(name: str, chunks: MakeChunks) -> Run:
    """The reference kernel of a family: an op `name`.

    Args:
        name: of the op.
        chunks: makes the family's mathematics for a call.
    """
    op = Op(
        name,
        Recurrence,
        fake=_allocate,
        forward=partial(_forward, chunks),
        backward=partial(_backward, chunks),
        saves=1,
        result=lambda x, outputs: RecurrenceOutput(outputs[0], outputs[1] if x.output_final_state else None),
    )
    # errors name the family's kernel, and where it can be imported from
    op.__module__ = chunks.__module__
    vars(op)["__qualname__"] = name
    return op


def _allocate(x: Recurrence) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state [N H K V] and chunk entry states [chunks B H K V]; the last two are empty unless wanted."""
    length = x.q.shape[1]
    chunk = x.chunk_size
    nothing = x.q.new_empty(0, dtype=x.wide)
    # documents have no more later chunks than they would have as one, however many they are
    saved = -(-length // chunk) if x.cu_seqlens is None else (length - 1) // chunk
    final_state = x.new_state(x.rows).zero_() if x.output_final_state else nothing
    entries = x.new_state(saved, x.q.shape[0]) if x.needs_grad else nothing.clone()
    return x.new_output(), final_state, entries


def _unsaved(x: Recurrence, stretch: Stretch, group: Group) -> int:
    """Entry states of a group that are not saved: of a document's first chunk, which is its initial state, or 0."""
    return int(x.cu_seqlens is not None and group.start == stretch.start)


def _tokens(x: Recurrence, group: Group, dtype: torch.dtype) -> GroupTokens:
    # what is multiplied with a view would be laid out as it is
    beta = None if x.beta is None else operand(x.beta[..., None], group, dtype).contiguous()
    q, k = (operand(tensor, group, dtype, x.shared) for tensor in (x.q, x.k))
    v = operand(x.v, group, dtype)
    a, b = (None if tensor is None else operand(tensor, group, dtype) for tensor in (x.a, x.b))
    return GroupTokens(q, k, v, beta, a, b)


def _forward(rule: MakeChunks, x: Recurrence) -> tuple[Tensor, Tensor, Tensor]:
    chunks = rule(x, False)
    output, final_state, entries = _allocate(x)
    rows = x.q.shape[0] * x.matrix[0]
    batch = x.q.shape[0]
    index = 0
    room = entries if x.needs_grad and x.cu_seqlens is None else x.new_state(chunks.most + 1, batch)
    for stretch in x.stretches:
        state = None if x.initial_state is None else x.initial_state[stretch.rows]
        for group in groups(stretch, x.chunk_size, chunks.most):
            first = group.start == stretch.start
            last = group.stop == stretch.stop
            unsaved = _unsaved(x, stretch, group)
            saved = entries[index : index + group.chunks - unsaved]
            # the states before each chunk and after the last, each formed in its place
            entered = saved if x.needs_grad and not unsaved else room[: group.chunks]
            states = [*entered]
            if not last:
                states.append(entries[index + len(saved)] if x.needs_grad else room[group.chunks])
            elif x.output_final_state:
                states.append(final_state[stretch.rows])
            if state is None:
                states[0].zero_()
            elif first or not x.needs_grad:
                states[0].copy_(state)
            # nothing is read of a state that is 0
            around = ChunkStates(entered, slice(rows if state is None else 0, None))
            store(output, group, chunks.forward(group, _tokens(x, group, chunks.dtype), around, states[1:]))
            if x.needs_grad and unsaved:
                saved.copy_(entered[1:])
            index = index + len(saved)
            state = states[-1]
        if x.output_final_state and state is not None and stretch.start == stretch.stop:
            final_state[stretch.rows].copy_(state)
    if x.needs_grad:
        entries[index:].zero_()  # documents that end in one chunk leave rows over
    return output, final_state, entries


def _backward(rule: MakeChunks, x: Recurrence, gradients: Gradients) -> dict[str, Tensor]:
    chunks = rule(x, "log_decay" in gradients.wanted)
    (d_output, d_final_state), (entries,) = gradients.outputs, gradients.saved
    if d_final_state is not None and not d_final_state.numel():
        d_final_state = None
    d_output = torch.zeros_like(x.v) if d_output is None else d_output
    given = {"q": x.q, "k": x.k, "v": x.v, "beta": x.beta, "a": x.a, "b": x.b}
    out = {name: tensor.new_empty(tensor.shape) for name, tensor in given.items() if tensor is not None}
    if x.log_decay is not None and "log_decay" in gradients.wanted:
        out["log_decay"] = torch.zeros_like(x.log_decay, dtype=x.wide, memory_format=torch.contiguous_format)
    if x.initial_state is not None:
        out["initial_state"] = x.initial_state.new_zeros(x.initial_state.shape)
    rows = x.q.shape[0] * x.matrix[0]
    most = chunks.most
    runs = [(stretch, groups(stretch, x.chunk_size, most)) for stretch in x.stretches]
    index = sum(group.chunks - _unsaved(x, stretch, group) for stretch, cuts in runs for group in cuts)
    # of the states before each chunk of a group and after the last
    d_states = x.new_state(most + 1, x.q.shape[0])
    for stretch, cuts in reversed(runs):
        # the gradient of the state after the group; None while nothing depends on it
        d_state = None if d_final_state is None else d_final_state[stretch.rows]
        for group in reversed(cuts):
            unsaved = _unsaved(x, stretch, group)
            index -= group.chunks - unsaved
            entered = entries[index : index + group.chunks - unsaved]
            if unsaved:
                initial = x.new_state(1, 1).zero_() if x.initial_state is None else x.initial_state[None, stretch.rows]
                entered = torch.cat((initial.to(x.wide), entered))
            # chunks that read a state which may be other than 0, and that leave one on which something depends
            blank = rows if group.start == stretch.start and x.initial_state is None else 0
            unread = rows if d_state is None else 0
            after = d_states[: group.chunks + 1]
            if d_state is None:
                after[-1].zero_()
            else:
                after[-1].copy_(d_state)
            found = chunks.backward(
                group,
                _tokens(x, group, chunks.dtype),
                operand(d_output, group, chunks.dtype),
                ChunkStates(entered, slice(blank, None)),
                after,
                slice(0, group.chunks * rows - unread),
            )
            for name, gradient in found.items():
                _add(out[name], group, gradient, x.shared if name in ("q", "k") else 1)
            d_state = d_states[0]
        if x.initial_state is not None and d_state is not None:
            out["initial_state"][stretch.rows].copy_(d_state)
    return out


def _add(out: Tensor, group: Group, gradient: Tensor, shared: int) -> None:
    """A group's gradient to where it belongs: its tokens in [B T H *], or the sum over all tokens in [H]; of what so
    many heads share, their sum."""
    if shared > 1:
        gradient = gradient.unflatten(0, (-1, shared)).sum(1)
    if out.ndim == 1:
        out += gradient.view(-1, len(out)).sum(0)
    else:
        store(out if out.ndim == 4 else out[..., None], group, gradient.view(*gradient.shape[:2], -1))
