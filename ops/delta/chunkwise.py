"""The delta family's chunkwise op, with its own backward.

What a token writes depends on what it reads of the state, and what the tokens of a chunk read depends on each other: a
triangular system (the chunkwise form of arXiv 2406.06484, by WY representation and UT transform; with the decays of
arXiv 2412.06464). Per chunk of m tokens with entry state S and exit state S' (notation of api.py; p, s, g, D of the
decays as in decay/chunkwise.py; e multiplies rows, and is 1 where b is given). With b = -e k left out, a negated and a
single key per token:

    A = scale (q k^T) * D        L = (a k^T) * D, below the diagonal
    R = v + L U + (a * p) S      U = e R,  so  U = T e (v + (a * p) S)  with  T = (1 - e L)^-1
    o = A U + scale (q * p) S    S' = g * S + (k * s)^T U

Queries and a read a state in the same way: the two are rows of X = [scale q; a], and A and L those of P = (X k^T) * D.
Where b is given, a token has two keys [b; k], which write Y = [U; v], and v in R is (a k^T * D) v; else Y = U.

And backward, from dS' and do:

    dY = A^T do + (k * s) dS'    z = T^T dU      dR = e z         de = <R, z>       dv = dR, or its part of dY + L^T dR
    dP = [do; dR] Y^T            dX, dk, da through P, as in recurrence/intra_chunk.py
    dX += ([do; dR] S^T) * p     dk += (Y dS'^T) * s              dS = g * dS' + (X * p)^T [do; dR]

T is formed once per chunk, by a solve: products with it are several times as fast as solves. Its entries are as bounded
as the state is: 1 on the diagonal and at most e below, where keys have norm 1 and e is up to 2.

The forward saves the chunks' entry states only; the backward recomputes the rest. Only states wait for each other: what
is inside chunks is formed for a group of n of them at once (recurrence/groups.py). A ragged last chunk is shorter.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..recurrence.chunk_loop import Chunks, ChunkStates, GroupTokens, chunkwise_kernel
from ..recurrence.family import Recurrence
from ..recurrence.groups import Group, most_chunks
from ..recurrence.intra_chunk import ChunkDecays, Outer, among, decays_of, scaled


class _System(NamedTuple):
    """What the chunks of a group read and write; what belongs to one token is side by side."""

    decays: ChunkDecays
    reads: Tensor
    """X, [G m*2 K]."""
    keys: Tensor
    """[G m*c K]: c is 2 where b is given, else 1."""
    pairs: Tensor
    """P, [G m*2 m*c]."""
    inverse: Tensor
    """T, [G m m]."""


class DeltaChunks(Chunks):
    """The mathematics above."""

    def __init__(self, x: Recurrence, needs_log_decay: bool) -> None:
        # of a chunk there are thrice the keys and values, and their pairs
        width = 3 * (sum(x.matrix[1:]) + x.chunk_size) // 2
        self.most = most_chunks(x.k, x.chunk_size, width)
        self.needs_log_decay = needs_log_decay
        self.decays = decays_of(x, 1.0, 2)
        self.scale = x.scale
        self.sign, self.c, self.dtype = (*((-1, 1) if x.b is None else (1, 2)), x.wide)

    def forward(self, group: Group, x: GroupTokens, states: ChunkStates, exits: list[Tensor]) -> Tensor:
        system = self._system(group, x)
        entries = states.entries
        reading = states.reading
        reads = scaled(system.reads, system.decays.prefix)
        keys = scaled(system.keys, system.decays.suffix)
        value, written, writes = self._value(x, system.pairs), *self._writes(x)
        for number, part in self._parts(group, x):
            own = value[part]
            if part.start >= reading.start:
                own = torch.baddbmm(own, reads[part, 1::2], entries[number].flatten(0, 1))
            torch.bmm(system.inverse[part], own if x.beta is None else x.beta[part] * own, out=written[part])
            if number < len(exits):
                change = torch.bmm(keys[part].mT, writes[part]).view(entries.shape[1:])
                system.decays.next_state(number, entries[number], change, exits[number])
        tile = torch.bmm(system.pairs[:, ::2], writes)
        if reading.start < len(tile):
            tile[reading].baddbmm_(reads[reading, ::2], entries.flatten(0, 2)[reading])
        return tile

    def backward(
        self, group: Group, x: GroupTokens, d_out: Tensor, states: ChunkStates, d_states: Tensor, leaving: slice
    ) -> dict[str, Tensor]:
        system = self._system(group, x)
        reading = states.reading
        entries = states.entries.flatten(0, 2)[reading]
        exits = d_states[1:].flatten(0, 2)[leaving]
        total = len(d_out)
        before = reading.start
        after = len(d_out) - leaving.stop
        reads = scaled(system.reads, system.decays.prefix)
        keys = scaled(system.keys, system.decays.suffix)
        value, written, writes = self._value(x, system.pairs), *self._writes(x)
        if before < total:
            value = value + among(torch.bmm(reads[reading, 1::2], entries), before, 0)
        torch.bmm(system.inverse, value if x.beta is None else x.beta * value, out=written)

        d_writes = torch.bmm(system.pairs[:, ::2].mT, d_out)
        d_read = d_out.new_empty(*d_out.shape[:2], 2, d_out.shape[2])
        solved = torch.empty_like(value)
        d_read[:, :, 0], d_reads = d_out, d_read.flatten(1, 2)
        for number, part in reversed(self._parts(group, x)):
            if part.start < leaving.stop:
                d_writes[part].baddbmm_(keys[part], exits[part])
            torch.bmm(system.inverse[part].mT, d_writes[part, :: self.c], out=solved[part])
            d_read[part, :, 1] = solved[part] if x.beta is None else x.beta[part] * solved[part]
            if part.start >= before:
                change = torch.bmm(reads[part].mT, d_reads[part]).view(d_states.shape[1:])
                system.decays.next_state(number, d_states[number + 1], change, d_states[number])

        found = {"v": d_read[:, :, 1]}
        if self.c == 2:
            found["v"] = torch.baddbmm(d_writes[:, 1::2], system.pairs[:, 1::2, 1::2].mT, found["v"])
        if x.beta is not None:
            error = torch.baddbmm(value, system.pairs[:, 1::2], written)
            found["beta"] = torch.linalg.vecdot(error, solved)[..., None]
        d_query = d_key = decayed = None
        if before < total:
            d_query = scaled(among(torch.bmm(d_reads[reading], entries.mT), before, 0), system.decays.prefix)
        if after < total:
            d_key = scaled(among(torch.bmm(writes[leaving], exits.mT), 0, after), system.decays.suffix)
        if self.needs_log_decay and d_query is not None and d_key is not None:
            decayed = (system.decays.decayed(states.entries) * d_states[1:]).sum(4).flatten(0, 2)
        outer = Outer(d_query, d_key, decayed) if self.needs_log_decay else None
        d_pairs = torch.bmm(d_reads, writes.mT)
        dx, dk, d_a = system.decays.scores_backward(system.reads, system.keys, system.pairs, d_pairs, outer)
        dx = dx if d_query is None else dx.add_(d_query)
        dk = dk if d_key is None else dk.add_(d_key)
        found |= {"q": dx[:, ::2] * self.scale, "k": dk[:, self.c - 1 :: self.c]}
        if x.a is None:
            found["k"] -= dx[:, 1::2]
        else:
            found["a"] = dx[:, 1::2] * self.sign
        if x.b is not None:
            found["b"] = dk[:, ::2]
        return found if d_a is None else found | {"log_decay": d_a}

    def _system(self, group: Group, x: GroupTokens) -> _System:
        decays = self.decays.chunks(group)
        a = x.k if x.a is None else x.a
        both = a.new_empty(*a.shape[:2], 2, a.shape[2])
        torch.mul(x.q, self.scale, out=both[:, :, 0])
        torch.mul(a, self.sign, out=both[:, :, 1])
        reads = both.flatten(1, 2)
        keys = x.k if x.b is None else torch.stack((x.b, x.k), dim=2).flatten(1, 2)
        pairs = decays.scores(reads, keys)
        recursive = pairs[:, 1::2, :: self.c]
        eye = torch.eye(group.length, dtype=a.dtype, device=a.device)
        matrix = -recursive if x.beta is None else -x.beta * recursive
        # of the matrix only what is below the diagonal is read; x A = 1 is solved faster than A x = 1
        inverse = torch.linalg.solve_triangular(matrix, eye, upper=False, left=False, unitriangular=True)
        return _System(decays, reads, keys, pairs, inverse)

    def _value(self, x: GroupTokens, pairs: Tensor) -> Tensor:
        """v, or what a reads of it where it is written by keys of its own."""
        return x.v if x.b is None else torch.bmm(pairs[:, 1::2, 1::2], x.v)

    def _writes(self, x: GroupTokens) -> tuple[Tensor, Tensor]:
        """Room for U, [G m V], and Y of which it is a part, [G m*c V]."""
        writes = x.v.new_empty(*x.v.shape[:2], self.c, x.v.shape[2])
        writes[:, :, 1:] = x.v[:, :, None]
        return writes[:, :, 0], writes.flatten(1, 2)

    def _parts(self, group: Group, x: GroupTokens) -> list[tuple[int, slice]]:
        """The chunks of a group: number, and rows of G."""
        rows = len(x.v) // group.chunks
        return [(number, slice(number * rows, (number + 1) * rows)) for number in range(group.chunks)]


delta_chunkwise = chunkwise_kernel("delta_chunkwise", DeltaChunks)
