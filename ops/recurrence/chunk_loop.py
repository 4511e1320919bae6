"""The chunkwise paradigm of any family: parallel inside chunks, recurrent between them; time and memory linear in T.

Notation of family.py; a chunk of m tokens has entry state S and exit state S'. Chunks are computed in groups of n
(groups.py); the chunks of a group, the batch and the heads are one dimension, G = n B H.

Only the states are computed one after another. The forward pass saves the entry state of every chunk (for packed
documents, of every chunk except a document's first); the backward pass recomputes the rest. A ragged last chunk is
shorter, without padding. No chunk contains tokens of two documents.
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
from .groups import Group, group_rows, groups, store_group


class GroupTokens(NamedTuple):
    """Tokens of a group, [G m D] each, in the family's `Chunks.dtype`."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor | None
    """Write strengths of the delta family [G m 1]."""
    a: Tensor | None
    b: Tensor | None


class ChunkStates(NamedTuple):
    """Entry states of the chunks of a group."""

    entries: Tensor
    """State before each chunk, [n B H K V]."""
    nonzero: slice
    """Slice of the dimension G (chunk, batch row, head), up to its end: the entry states before it are zero."""


class Chunks(ABC):
    """Computations of a family inside chunks, forward and backward.

    One object serves all chunks of a call, so terms that the chunks share are computed once.
    """

    max_chunks: int
    """Maximum number of chunks in a group."""
    dtype: torch.dtype
    """Dtype of the tokens and of the gradients of outputs that `forward` and `backward` receive."""

    @abstractmethod
    def forward(self, group: Group, x: GroupTokens, states: ChunkStates, exits: list[Tensor]) -> Tensor:
        """Return the output of a group, and write the states after its chunks to `exits`.

        The output is [G m V], or [G m K] if queries read values.

        Args:
            group: position of the tokens.
            x: tokens of the group.
            states: states before each chunk. Only the first is filled; the others share memory with `exits`.
            exits: states after each chunk, [B H K V] each; the last one is missing if it is not wanted.
        """

    @abstractmethod
    def backward(
        self, group: Group, x: GroupTokens, d_out: Tensor, states: ChunkStates, d_states: Tensor, used: slice
    ) -> Mapping[str, Tensor]:
        """Return the gradients of a group by name: of q, k, v, beta, a, b [G m D], and of log_decay if it is wanted.

        The gradient of log_decay is [G m D], or [G] for fixed decays, summed over the tokens of a chunk.

        Args:
            group: position of the tokens.
            x: tokens of the group.
            d_out: gradient of the output.
            states: states before each chunk.
            d_states: gradients of the states before each chunk and after the last, [n+1 B H K V]. The last entry is an
                input; this method writes the others, except for entry states that are zero (`states.nonzero`).
            used: slice of the dimension G, from its start: the loss does not depend on the exit states after it.
        """


MakeChunks: TypeAlias = Callable[[Recurrence, bool], Chunks]
"""Builds the `Chunks` of a call; the flag is True if the gradient of log_decay is wanted."""


def chunkwise_kernel(name: str, make_chunks: MakeChunks) -> Run:
    """Build the chunkwise reference kernel of a family.

    Args:
        name: name of the op to register.
        make_chunks: builds the family's `Chunks` for a call.
    """
    op = Op(
        name,
        Recurrence,
        fake=_allocate,
        forward=partial(_forward, make_chunks),
        backward=partial(_backward, make_chunks),
        saves=1,
        result=lambda x, outputs: RecurrenceOutput(outputs[0], outputs[1] if x.output_final_state else None),
    )
    # errors show the name of the kernel and the module from which it can be imported
    op.__module__ = make_chunks.__module__
    vars(op)["__qualname__"] = name
    return op


def _allocate(x: Recurrence) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate output, final state [N H K V] and chunk entry states [chunks B H K V]; states not needed are empty."""
    length = x.q.shape[1]
    chunk = x.chunk_size
    empty = x.q.new_empty(0, dtype=x.wide_dtype)
    # a row of several documents has at most as many non-first chunks as a row of one document
    saved = -(-length // chunk) if x.cu_seqlens is None else (length - 1) // chunk
    final_state = x.new_state(x.rows).zero_() if x.output_final_state else empty
    entries = x.new_state(saved, x.q.shape[0]) if x.needs_grad else empty.clone()
    return x.new_output(), final_state, entries


def _count_unsaved(x: Recurrence, stretch: Stretch, group: Group) -> int:
    """Return the number of entry states of a group that are not saved: 1 if it has a document's first chunk, else 0.

    The entry state of a document's first chunk is the document's initial state.
    """
    return int(x.cu_seqlens is not None and group.start == stretch.start)


def _tokens(x: Recurrence, group: Group, dtype: torch.dtype) -> GroupTokens:
    # beta is made contiguous, because a product with a view would inherit the view's layout
    beta = None if x.beta is None else group_rows(x.beta[..., None], group, dtype).contiguous()
    q, k = (group_rows(tensor, group, dtype, x.heads_per_key) for tensor in (x.q, x.k))
    v = group_rows(x.v, group, dtype)
    a, b = (None if tensor is None else group_rows(tensor, group, dtype) for tensor in (x.a, x.b))
    return GroupTokens(q, k, v, beta, a, b)


def _forward(make_chunks: MakeChunks, x: Recurrence) -> tuple[Tensor, Tensor, Tensor]:
    chunks = make_chunks(x, False)
    output, final_state, entries = _allocate(x)
    rows = x.q.shape[0] * x.state_shape[0]
    batch = x.q.shape[0]
    index = 0
    buffer = entries if x.needs_grad and x.cu_seqlens is None else x.new_state(chunks.max_chunks + 1, batch)
    for stretch in x.stretches:
        state = None if x.initial_state is None else x.initial_state[stretch.rows]
        for group in groups(stretch, x.chunk_size, chunks.max_chunks):
            first = group.start == stretch.start
            last = group.stop == stretch.stop
            unsaved = _count_unsaved(x, stretch, group)
            saved = entries[index : index + group.chunks - unsaved]
            # the states before each chunk and after the last are computed where they are stored
            group_entries = saved if x.needs_grad and not unsaved else buffer[: group.chunks]
            states = [*group_entries]
            if not last:
                states.append(entries[index + len(saved)] if x.needs_grad else buffer[group.chunks])
            elif x.output_final_state:
                states.append(final_state[stretch.rows])
            if state is None:
                states[0].zero_()
            elif first or not x.needs_grad:
                states[0].copy_(state)
            # a zero state contributes nothing to the output
            before = ChunkStates(group_entries, slice(rows if state is None else 0, None))
            store_group(output, group, chunks.forward(group, _tokens(x, group, chunks.dtype), before, states[1:]))
            if x.needs_grad and unsaved:
                saved.copy_(group_entries[1:])
            index = index + len(saved)
            state = states[-1]
        if x.output_final_state and state is not None and stretch.start == stretch.stop:
            final_state[stretch.rows].copy_(state)
    if x.needs_grad:
        entries[index:].zero_()  # documents may use fewer rows than allocated
    return output, final_state, entries


def _backward(make_chunks: MakeChunks, x: Recurrence, gradients: Gradients) -> dict[str, Tensor]:
    chunks = make_chunks(x, "log_decay" in gradients.wanted)
    (d_output, d_final_state), (entries,) = gradients.outputs, gradients.saved
    if d_final_state is not None and not d_final_state.numel():
        d_final_state = None
    d_output = x.new_output().zero_() if d_output is None else d_output
    inputs = {"q": x.q, "k": x.k, "v": x.v, "beta": x.beta, "a": x.a, "b": x.b}
    out = {name: tensor.new_empty(tensor.shape) for name, tensor in inputs.items() if tensor is not None}
    if x.log_decay is not None and "log_decay" in gradients.wanted:
        out["log_decay"] = torch.zeros_like(x.log_decay, dtype=x.wide_dtype, memory_format=torch.contiguous_format)
    if x.initial_state is not None:
        out["initial_state"] = x.initial_state.new_zeros(x.initial_state.shape)
    rows = x.q.shape[0] * x.state_shape[0]
    plan = [(stretch, groups(stretch, x.chunk_size, chunks.max_chunks)) for stretch in x.stretches]
    index = sum(group.chunks - _count_unsaved(x, stretch, group) for stretch, parts in plan for group in parts)
    # gradients of the states before each chunk of a group and after the last
    d_states = x.new_state(chunks.max_chunks + 1, x.q.shape[0])
    for stretch, parts in reversed(plan):
        # the gradient of the state after the group; None if the loss does not depend on it
        d_state = None if d_final_state is None else d_final_state[stretch.rows]
        for group in reversed(parts):
            unsaved = _count_unsaved(x, stretch, group)
            index -= group.chunks - unsaved
            group_entries = entries[index : index + group.chunks - unsaved]
            if unsaved:
                initial = x.new_state(1, 1).zero_() if x.initial_state is None else x.initial_state[None, stretch.rows]
                group_entries = torch.cat((initial.to(x.wide_dtype), group_entries))
            # the first chunk may start from a zero state; the loss may not depend on the state after the last chunk
            zero_rows = rows if group.start == stretch.start and x.initial_state is None else 0
            unused_rows = rows if d_state is None else 0
            d_group_states = d_states[: group.chunks + 1]
            if d_state is None:
                d_group_states[-1].zero_()
            else:
                d_group_states[-1].copy_(d_state)
            group_gradients = chunks.backward(
                group,
                _tokens(x, group, chunks.dtype),
                group_rows(d_output, group, chunks.dtype),
                ChunkStates(group_entries, slice(zero_rows, None)),
                d_group_states,
                slice(0, group.chunks * rows - unused_rows),
            )
            for name, gradient in group_gradients.items():
                _add(out[name], group, gradient, x.heads_per_key if name in ("q", "k") else 1)
            d_state = d_states[0]
        if x.initial_state is not None and d_state is not None:
            out["initial_state"][stretch.rows].copy_(d_state)
    return out


def _add(out: Tensor, group: Group, gradient: Tensor, heads_per_key: int) -> None:
    """Write a group's gradient to its tokens in out [B T H *], or add its sum over all tokens to out [H].

    Gradients of an input that `heads_per_key` heads share are summed over these heads.
    """
    if heads_per_key > 1:
        gradient = gradient.unflatten(0, (-1, heads_per_key)).sum(1)
    if out.ndim == 1:
        out += gradient.view(-1, len(out)).sum(0)
    else:
        store_group(out if out.ndim == 4 else out[..., None], group, gradient.view(*gradient.shape[:2], -1))
