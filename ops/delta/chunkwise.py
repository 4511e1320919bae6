"""The chunkwise kernel of the delta family, with its own backward pass.

What a token writes depends on what it reads from the state, which depends on the writes of earlier tokens. Inside a
chunk this is a triangular system (chunkwise form of arXiv 2406.06484, by WY representation and UT transform; with the
decays of arXiv 2412.06464). Per chunk of m tokens with entry state S and exit state S', in the notation of api.py, with
p, s, g, D as in decay/chunkwise.py and e = beta as a factor of rows (1 if there is no beta). If b is None (b = -e k),
each token has one key, and a stands for the negated a:

    A = scale (q k^T) * D        L = (a k^T) * D, below the diagonal
    R = v + L U + (a * p) S      U = e R,  so  U = T e (v + (a * p) S)  with  T = (1 - e L)^-1
    o = A U + scale (q * p) S    S' = g * S + (k * s)^T U

Queries and a read a state in the same way: they are the rows of X = [scale q; a], and A and L are those of
P = (X k^T) * D. If b is set, a token has two keys [b; k], which write Y = [U; v], and (a k^T * D) v takes the place of
v in R; otherwise Y = U.

In the backward pass, from dS' and do:

    dY = A^T do + (k * s) dS'    z = T^T dU      dR = e z         de = <R, z>       dv = dR
    dP = [do; dR] Y^T            dX, dk, da through P, as in recurrence/intra_chunk.py
    dX += ([do; dR] S^T) * p     dk += (Y dS'^T) * s              dS = g * dS' + (X * p)^T [do; dR]

If b is set, dv is the part of dY that belongs to v, plus (a k^T * D)^T dR.

T is computed once per chunk, by a triangular solve: products with T are several times as fast as further solves. Its
entries are bounded if the state is: for keys of norm 1 and e up to 2, they are 1 on the diagonal and at most e below.

recurrence/chunk_loop.py runs the chunks; decays and P are computed in recurrence/intra_chunk.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..recurrence.chunk_loop import Chunks, ChunkStates, GroupTokens, chunkwise_kernel
from ..recurrence.family import Recurrence
from ..recurrence.groups import Group, max_chunks
from ..recurrence.intra_chunk import ChunkDecays, StateGradients, make_decays, pad_rows, scale_tokens


class _System(NamedTuple):
    """Triangular systems of the chunks of a group; rows of one token are adjacent."""

    decays: ChunkDecays
    reads: Tensor
    """X: queries times scale, and keys that read, [G m*2 K]."""
    keys: Tensor
    """Keys that write, [G m*c K]; c is 2 if b is set, else 1."""
    pairs: Tensor
    """P: scores of all pairs, [G m*2 m*c]."""
    inverse: Tensor
    """T: inverse of the system, [G m m]."""


class DeltaChunks(Chunks):
    """Forward and backward of the delta rule in chunks, by the equations of this module."""

    def __init__(self, x: Recurrence, needs_log_decay: bool) -> None:
        # a chunk needs memory for three times its keys and values, and for the pairs of its tokens
        width = 3 * (sum(x.state_shape[1:]) + x.chunk_size) // 2
        self.max_chunks = max_chunks(x.k, x.chunk_size, width)
        self.needs_log_decay = needs_log_decay
        self.decays = make_decays(x, 1.0, 2)
        self.scale = x.scale
        self.sign = -1 if x.b is None else 1
        self.c = 1 if x.b is None else 2
        self.dtype = x.wide_dtype

    def forward(self, group: Group, x: GroupTokens, states: ChunkStates, exits: list[Tensor]) -> Tensor:
        system = self._system(group, x)
        entries = states.entries
        nonzero = states.nonzero
        reads = scale_tokens(system.reads, system.decays.prefix)
        keys = scale_tokens(system.keys, system.decays.suffix)
        value = self._value(x, system.pairs)
        written, writes = self._allocate_writes(x)
        for number, part in self._chunk_rows(group, x):
            error = value[part]
            if part.start >= nonzero.start:
                error = torch.baddbmm(error, reads[part, 1::2], entries[number].flatten(0, 1))
            torch.bmm(system.inverse[part], error if x.beta is None else x.beta[part] * error, out=written[part])
            if number < len(exits):
                change = torch.bmm(keys[part].mT, writes[part]).view(entries.shape[1:])
                system.decays.next_state(number, entries[number], change, exits[number])
        output = torch.bmm(system.pairs[:, ::2], writes)
        if nonzero.start < len(output):
            output[nonzero].baddbmm_(reads[nonzero, ::2], entries.flatten(0, 2)[nonzero])
        return output

    def backward(
        self, group: Group, x: GroupTokens, d_out: Tensor, states: ChunkStates, d_states: Tensor, used: slice
    ) -> dict[str, Tensor]:
        system = self._system(group, x)
        nonzero = states.nonzero
        entries = states.entries.flatten(0, 2)[nonzero]
        d_exits = d_states[1:].flatten(0, 2)[used]
        rows = len(d_out)
        zero_rows = nonzero.start
        unused_rows = rows - used.stop
        reads = scale_tokens(system.reads, system.decays.prefix)
        keys = scale_tokens(system.keys, system.decays.suffix)
        value = self._value(x, system.pairs)
        written, writes = self._allocate_writes(x)
        if zero_rows < rows:
            value = value + pad_rows(torch.bmm(reads[nonzero, 1::2], entries), zero_rows, 0)
        torch.bmm(system.inverse, value if x.beta is None else x.beta * value, out=written)

        d_writes = torch.bmm(system.pairs[:, ::2].mT, d_out)
        d_read = d_out.new_empty(*d_out.shape[:2], 2, d_out.shape[2])  # [do; dR]
        d_read[:, :, 0] = d_out
        d_reads = d_read.flatten(1, 2)
        solved = torch.empty_like(value)
        for number, part in reversed(self._chunk_rows(group, x)):
            if part.start < used.stop:
                d_writes[part].baddbmm_(keys[part], d_exits[part])
            torch.bmm(system.inverse[part].mT, d_writes[part, :: self.c], out=solved[part])
            d_read[part, :, 1] = solved[part] if x.beta is None else x.beta[part] * solved[part]
            if part.start >= zero_rows:
                change = torch.bmm(reads[part].mT, d_reads[part]).view(d_states.shape[1:])
                system.decays.next_state(number, d_states[number + 1], change, d_states[number])

        gradients = {"v": d_read[:, :, 1]}
        if self.c == 2:
            gradients["v"] = torch.baddbmm(d_writes[:, 1::2], system.pairs[:, 1::2, 1::2].mT, gradients["v"])
        if x.beta is not None:
            error = torch.baddbmm(value, system.pairs[:, 1::2], written)
            gradients["beta"] = torch.linalg.vecdot(error, solved)[..., None]
        # gradients through the states
        d_query = None
        d_key = None
        d_total = None
        if zero_rows < rows:
            d_query = pad_rows(torch.bmm(d_reads[nonzero], entries.mT), zero_rows, 0)
            d_query = scale_tokens(d_query, system.decays.prefix)
        if unused_rows < rows:
            d_key = pad_rows(torch.bmm(writes[used], d_exits.mT), 0, unused_rows)
            d_key = scale_tokens(d_key, system.decays.suffix)
        if self.needs_log_decay and d_query is not None and d_key is not None:
            d_total = (system.decays.apply_total(states.entries) * d_states[1:]).sum(4).flatten(0, 2)
        through_states = StateGradients(d_query, d_key, d_total) if self.needs_log_decay else None
        d_pairs = torch.bmm(d_reads, writes.mT)
        dx, dk, d_a = system.decays.scores_backward(system.reads, system.keys, system.pairs, d_pairs, through_states)
        dx = dx if d_query is None else dx.add_(d_query)
        dk = dk if d_key is None else dk.add_(d_key)
        gradients |= {"q": dx[:, ::2] * self.scale, "k": dk[:, self.c - 1 :: self.c]}
        if x.a is None:
            gradients["k"] -= dx[:, 1::2]
        else:
            gradients["a"] = dx[:, 1::2] * self.sign
        if x.b is not None:
            gradients["b"] = dk[:, ::2]
        return gradients if d_a is None else gradients | {"log_decay": d_a}

    def _system(self, group: Group, x: GroupTokens) -> _System:
        decays = self.decays.chunks(group)
        a = x.k if x.a is None else x.a
        stacked = a.new_empty(*a.shape[:2], 2, a.shape[2])
        torch.mul(x.q, self.scale, out=stacked[:, :, 0])
        torch.mul(a, self.sign, out=stacked[:, :, 1])
        reads = stacked.flatten(1, 2)
        keys = x.k if x.b is None else torch.stack((x.b, x.k), dim=2).flatten(1, 2)
        pairs = decays.scores(reads, keys)
        recursive = pairs[:, 1::2, :: self.c]
        eye = torch.eye(group.length, dtype=a.dtype, device=a.device)
        matrix = -recursive if x.beta is None else -x.beta * recursive
        # the solver reads only entries below the diagonal; it solves x A = 1 faster than A x = 1
        inverse = torch.linalg.solve_triangular(matrix, eye, upper=False, left=False, unitriangular=True)
        return _System(decays, reads, keys, pairs, inverse)

    def _value(self, x: GroupTokens, pairs: Tensor) -> Tensor:
        """Return v; or if b is set, what a reads of the values written inside the chunk, (a k^T * D) v."""
        return x.v if x.b is None else torch.bmm(pairs[:, 1::2, 1::2], x.v)

    def _allocate_writes(self, x: GroupTokens) -> tuple[Tensor, Tensor]:
        """Allocate U [G m V], a view of a part of Y, and Y [G m*c V], whose other part is v."""
        writes = x.v.new_empty(*x.v.shape[:2], self.c, x.v.shape[2])
        writes[:, :, 1:] = x.v[:, :, None]
        return writes[:, :, 0], writes.flatten(1, 2)

    def _chunk_rows(self, group: Group, x: GroupTokens) -> list[tuple[int, slice]]:
        """Return for each chunk its index in the group, and its slice of the first dimension, G."""
        rows = len(x.v) // group.chunks
        return [(number, slice(number * rows, (number + 1) * rows)) for number in range(group.chunks)]


delta_chunkwise = chunkwise_kernel("delta_chunkwise", DeltaChunks)
