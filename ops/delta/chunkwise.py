"""The delta family's chunkwise op, with its own backward.

What a token writes is the error of the prediction at its key, and the predictions inside a chunk depend on each other:
a triangular system (the chunkwise form of arXiv 2406.06484, by WY representation and UT transform; with the decays of
arXiv 2412.06464). Per chunk of m tokens with entry state S and exit state S' (notation of api.py; p, s, g, D of the
decays as in decay/chunkwise.py; b multiplies rows):

    A = scale (q k^T) * D        L = (k k^T) * D, below the diagonal
    E = v - L U - (k * p) S      U = b E, so  U = T b (v - (k * p) S)  with  T = (1 + b L)^-1
    o = A U + scale (q * p) S    S' = g * S + (k * s)^T U

Queries and keys read a state in the same way: with X = [q; k], Y = [o; E], M = [scale D; -D below the diagonal] and
r = [scale p; -p],

    P = (X k^T) * M = [A; -L]    Y = P U + (X * r) S + [0; v]

and backward, from dS' and do:

    dU = T^T (A^T do + (k * s) dS')          dE = b dU        dY = [do; dE]       dv = dE       db = <E, dU>_V
    dP = dY U^T                  dX = (dP * M) k + (dY S^T) * r          dk += (dP * M)^T X + (U dS'^T) * s
    dS = g * dS' + (X * r)^T dY
    da_l = sum_{j < l <= i} (dP * P)_ij + sum_{i >= l} <X, (dY S^T) * r>_i
         + sum_{j < l} <k, (U dS'^T) * s>_j + <g * S, dS'>

with i a row of queries or of keys; every term is added to the decays that it went through, and none is taken away
again. T is formed once per chunk, by a solve: products with it are several times as fast as solves. Its entries are
as bounded as the state is: 1 on the diagonal and at most b below, where keys have norm 1 and b is up to 2.

The forward saves the chunks' entry states only; the backward recomputes the rest, chunk by chunk. A ragged last chunk
is shorter. Inside a chunk batch and heads are one dimension, G = B H, as batched products want it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..chunks import Group, sum_after
from ..chunkwise import Chunks, ChunkStates, Tokens, chunkwise_kernel
from ..recurrence import Recurrence


class _Decays(NamedTuple):
    """The decays of one chunk of m tokens; what is 1 everywhere is None."""

    mask: Tensor
    """M, [G|1 2m m]."""
    read: Tensor
    """r, [G|1 2m 1]."""
    suffix: Tensor | None
    """s, [G m 1]."""
    total: Tensor | None
    """g, [G 1 1]."""


class _ChunkDecays:
    """Forms the decays of chunks: for every one where they depend on the token, else once for every length."""

    def __init__(self, log_decay: Tensor | None, batch: int, size: int, scale: float, like: Tensor) -> None:
        self.log_decay, self.batch, self.dtype = log_decay, batch, like.dtype
        causal = like.new_ones(size, size).tril()
        self.factor = like.new_tensor([scale, -1.0])[:, None, None]
        self.signs = self.factor * torch.stack((causal, causal.tril(-1)))  # M without decays
        self.later = self.signs[1] != 0
        self.formed: dict[int, _Decays] = {}

    def __call__(self, start: int, stop: int) -> _Decays:
        a, m = self.log_decay, stop - start
        if a is not None and a.ndim == 3:
            return self._form(a[:, start:stop])
        if m not in self.formed:
            self.formed[m] = self._none(m) if a is None else self._form(a.expand(self.batch, m, -1))
        return self.formed[m]

    def _none(self, m: int) -> _Decays:
        mask, read = self.signs[:, :m, :m].flatten(0, 1), self.factor.expand(-1, m, -1).flatten(0, 1)
        return _Decays(mask[None], read[None], None, None)

    def _form(self, a: Tensor) -> _Decays:
        """Of log-decays [B m H]."""
        a, m = a.to(self.dtype).transpose(1, 2).flatten(0, 1), a.shape[1]
        # entry [i, j] adds up a[l] for j < l <= i; above the diagonal it is 0, and its sign too
        pairs = torch.where(self.later[:m, :m], a[:, :, None], 0).cumsum(1).exp_()
        prefix = a.cumsum(1).exp_()[:, None, :, None]
        return _Decays(
            mask=(pairs[:, None] * self.signs[:, :m, :m]).flatten(1, 2),
            read=(prefix * self.factor).flatten(1, 2),
            suffix=sum_after(a, 1).exp_()[..., None],
            total=prefix[:, 0, -1:],
        )


def _system(query: Tensor, key: Tensor, beta: Tensor, decays: _Decays) -> tuple[Tensor, Tensor, Tensor]:
    """X, P and T of a chunk."""
    reads = torch.cat((query, key), dim=1)
    pairs = torch.bmm(reads, key.mT).mul_(decays.mask)
    eye = torch.eye(key.shape[1], dtype=key.dtype, device=key.device)
    # of the matrix only what is below the diagonal is read; x A = 1 is solved faster than A x = 1
    inverse = torch.linalg.solve_triangular(-beta * _of_keys(pairs), eye, upper=False, left=False, unitriangular=True)
    return reads, pairs, inverse


def _of_queries(x: Tensor) -> Tensor:
    """The upper half of rows: [G 2m *] -> [G m *]."""
    return x[:, : x.shape[1] // 2]


def _of_keys(x: Tensor) -> Tensor:
    """The lower half."""
    return x[:, x.shape[1] // 2 :]


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _log_decay_gradient(within: Tensor, read: Tensor | None, left: Tensor | None) -> Tensor:
    """One chunk of da [G m], but for what the entry state left in the exit state: of dP * P [G 2m m], of what each row
    of X read of the entry state [G 2m], and of what each key left in the exit state [G m]."""
    # entry [i, l] adds up what token i read of the tokens before l, the entry state first
    before = within.unflatten(1, (2, -1)).sum(1).roll(1, 2)
    before[..., 0] = 0 if read is None else read.unflatten(1, (2, -1)).sum(1)
    grad = before.cumsum(2).tril_().sum(1)
    if left is not None:
        grad[:, 1:] += left[:, :-1].cumsum(1)
    return grad


class _DeltaChunks(Chunks):
    most = 1

    def __init__(self, x: Recurrence, needs_log_decay: bool) -> None:
        self.needs_log_decay, self.fixed = needs_log_decay, x.log_decay is not None and x.log_decay.ndim == 1
        like = x.q.new_empty(0, dtype=x.wide)
        self.decays = _ChunkDecays(x.log_decay, x.q.shape[0], min(x.chunk_size, x.q.shape[1]), x.scale, like)

    def forward(self, group: Group, x: Tokens, states: ChunkStates, exits: list[Tensor]) -> Tensor:
        assert x.beta is not None
        decays, state = self.decays(group.start, group.stop), self._entered(x, states)
        reads, pairs, inverse = _system(x.q, x.k, x.beta, decays)
        if state is None:
            written = torch.bmm(inverse, x.beta * x.v)
            tile = torch.bmm(_of_queries(pairs), written)
        else:
            outer = torch.bmm(reads, state).mul_(decays.read)
            written = torch.bmm(inverse, x.beta * (x.v + _of_keys(outer)))
            tile = torch.baddbmm(_of_queries(outer), _of_queries(pairs), written)
        if exits:
            _next_state(state, _times(x.k, decays.suffix), written, decays.total, exits[0])
        return tile

    def backward(
        self, group: Group, x: Tokens, d_out: Tensor, states: ChunkStates, d_states: Tensor, leaving: slice
    ) -> dict[str, Tensor]:
        assert x.beta is not None
        decays, state = self.decays(group.start, group.stop), self._entered(x, states)
        d_state = d_states[1].flatten(0, 1) if leaving.stop else None
        reads, pairs, inverse = _system(x.q, x.k, x.beta, decays)
        value = x.v if state is None else torch.addcmul(x.v, torch.bmm(x.k, state), _of_keys(decays.read))
        written = torch.bmm(inverse, x.beta * value)
        error = torch.baddbmm(value, _of_keys(pairs), written)

        d_written = torch.bmm(_of_queries(pairs).mT, d_out)
        if d_state is not None:
            d_written.baddbmm_(_times(x.k, decays.suffix), d_state)
        d_written = torch.bmm(inverse.mT, d_written)
        d_read = torch.cat((d_out, x.beta * d_written), dim=1)
        d_pairs = torch.bmm(d_read, written.mT)
        within = d_pairs * pairs if self.needs_log_decay else None
        d_pairs.mul_(decays.mask)
        d_reads, d_key = torch.bmm(d_pairs, x.k), torch.bmm(d_pairs.mT, reads)
        d_value, d_outer, d_key_outer = _of_keys(d_read), None, None
        if state is not None:
            d_read = d_read * decays.read
            d_outer = torch.bmm(d_read, state.mT)
            d_reads += d_outer
        if d_state is not None:
            d_key_outer = _times(torch.bmm(written, d_state.mT), decays.suffix)
            d_key += d_key_outer
        d_key += _of_keys(d_reads)
        found = {"q": _of_queries(d_reads), "k": d_key, "v": d_value}
        found["beta"] = (error * d_written).sum(2, keepdim=True)
        if within is not None:
            d_a = _log_decay_gradient(
                within,
                None if d_outer is None else torch.linalg.vecdot(reads, d_outer),
                None if d_key_outer is None else torch.linalg.vecdot(x.k, d_key_outer),
            )
            if state is not None and d_state is not None:
                decayed = _times(state, decays.total)
                d_a += torch.linalg.vecdot(decayed.flatten(1), d_state.flatten(1))[:, None]
            found["log_decay"] = d_a.sum(1) if self.fixed else d_a
        if state is not None:
            _next_state(d_state, reads, d_read, decays.total, d_states[0].flatten(0, 1))
        return found

    def _entered(self, x: Tokens, states: ChunkStates) -> Tensor | None:
        """The state before the chunk, [G K V]; None where it is 0."""
        return None if states.reading.start == x.q.shape[0] else states.entries[0].flatten(0, 1)


def _next_state(state: Tensor | None, key: Tensor, written: Tensor, total: Tensor | None, out: Tensor) -> None:
    """g * S + key^T U into `out`."""
    out = out.view(key.shape[0], key.shape[2], written.shape[2])
    if state is None:
        torch.bmm(key.mT, written, out=out)
    else:
        torch.baddbmm(_times(state, total), key.mT, written, out=out)


delta_chunkwise = chunkwise_kernel("delta_chunkwise", _DeltaChunks)
