"""The decay family's chunkwise op, with its own backward.

Per chunk of m tokens with entry state S and exit state S' (notation of api.py; i, j count from 0 inside the chunk):

    p_i = exp(a_0 + .. + a_i)    s_j = exp(a_{j+1} + .. + a_{m-1})    g = p_{m-1}
    D_ij = exp(a_{j+1} + .. + a_i), i >= j
    A = scale (q k^T) * D        o = A v + scale (q * p) S            S' = g * S + (k * s)^T v

and backward, from dS' and do:

    dP = scale (do v^T) * D      dq = dP k + scale (do S^T) * p       dk = dP^T q + (v dS'^T) * s
    dv = A^T do + (k * s) dS'    dS = g * dS' + scale (q * p)^T do
    da_l = sum_{j < l <= i} (A * (do v^T))_ij + sum_{i >= l} q_i (scale (do S^T) * p)_i
         + sum_{j < l} k_j ((v dS'^T) * s)_j + <g * S, dS'>_V        per key dimension; summed over K for a scalar

Every term of da is added to the decays that it went through, and none is taken away again: sums of q dq - k dk are as
much, but where decays are strong they are all rounding errors.

The forward saves the chunks' entry states only; the backward recomputes the rest. Only states wait for each other: what
is inside chunks is formed for a group of n of them at once (chunks.py). A ragged last chunk is simply shorter: nothing
is padded.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import Group, cut, most_chunks, sum_after
from ..chunkwise import Chunks, ChunkStates, Tokens, chunkwise_kernel
from ..recurrence import Recurrence


class _Outer(NamedTuple):
    """What of a chunk's gradients came through the states; None is 0."""

    d_query: Tensor | None
    """[G m K]."""
    d_key: Tensor | None
    """[G m K]."""
    decayed: Tensor | None
    """<g * S, dS'>_V, [G K]."""


class _Chunk(ABC):
    """The decays of a group of chunks; each factor broadcasts over [n B H m K] with n B as one dimension."""

    prefix: Tensor
    """scale * p."""
    suffix: Tensor | None
    """s; None is 1."""
    total: Tensor | None
    """g, [n|1 B|1 H K|1 1]; None is 1."""

    def decayed(self, states: Tensor) -> Tensor:
        """g * S of the group's states [n B H K V]."""
        return states if self.total is None else states * self.total

    def next_state(self, number: int, state: Tensor, change: Tensor, out: Tensor) -> None:
        """g * S + change of one chunk of the group into `out`, each [B H K V]."""
        if self.total is None:
            torch.add(state, change, out=out)
        else:
            torch.addcmul(change, state, self.total[number if len(self.total) > 1 else 0], out=out)

    @abstractmethod
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """A [G m m]."""

    @abstractmethod
    def scores_backward(
        self, q: Tensor, k: Tensor, scores: Tensor, d_scores: Tensor, outer: _Outer | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The parts of dq and dk that come through A, and the whole of da; consumes scores and d_scores, A's.

        `outer` is what comes through the states; None if da is not wanted, which then is None too.
        """


class _ScalarChunk(_Chunk):
    """One decay for all key dimensions: A is a product with a mask D [n B|1 H m m]."""

    def __init__(self, mask: Tensor, prefix: Tensor, suffix: Tensor | None, total: Tensor | None) -> None:
        self.mask, self.prefix, self.suffix, self.total = mask, prefix, suffix, total

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self._masked(torch.bmm(q, k.mT))

    def scores_backward(
        self, q: Tensor, k: Tensor, scores: Tensor, d_scores: Tensor, outer: _Outer | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        d_a = None
        if outer is not None:
            read = None if outer.d_query is None else torch.linalg.vecdot(q, outer.d_query)
            left = None if outer.d_key is None else torch.linalg.vecdot(k, outer.d_key)
            decayed = None if outer.decayed is None else outer.decayed.sum(1)
            d_a = self._log_decay_gradient(scores.mul_(d_scores), read, left, decayed)
        d_products = self._masked(d_scores)
        return torch.bmm(d_products, k), torch.bmm(d_products.mT, q), d_a

    def _log_decay_gradient(
        self, pairs: Tensor, read: Tensor | None, left: Tensor | None, decayed: Tensor | None
    ) -> Tensor:
        """da [G m], of A * (do v^T), which is consumed, of what each query read of the entry state [G m], what each key
        left in the exit state [G m], and what the entry state left there [G]."""
        # entry [i, l] adds up what token i read of the tokens before l, the entry state first
        before = pairs.roll(1, 2)
        before[..., 0] = 0 if read is None else read
        grad = before.cumsum(2).tril_().sum(1)
        if left is not None:
            grad[:, 1:] += left[:, :-1].cumsum(1)
        if decayed is not None:
            grad += decayed[:, None]
        return grad

    def _masked(self, x: Tensor) -> Tensor:
        x.view(-1, *self.mask.shape[1:]).mul_(self.mask)
        return x


class _FixedChunk(_ScalarChunk):
    """The same decay for all tokens: da [G] is theirs together, every term as often as it was decayed."""

    def __init__(
        self, mask: Tensor, prefix: Tensor, suffix: Tensor | None, total: Tensor | None, distance: Tensor
    ) -> None:
        super().__init__(mask, prefix, suffix, total)
        self.distance = distance

    def _log_decay_gradient(
        self, pairs: Tensor, read: Tensor | None, left: Tensor | None, decayed: Tensor | None
    ) -> Tensor:
        m, count = len(self.distance), self.distance[:, 0]
        grad = pairs.mul_(self.distance).sum((1, 2))
        if read is not None:
            grad += read @ (count + 1)
        if left is not None:
            grad += left @ (m - 1 - count)
        if decayed is not None:
            grad += m * decayed
        return grad


class _VectorChunk(_Chunk):
    """One decay per key dimension, a [n B H m K]: every pair by way of the middle of the smallest block that holds it.

    The chunk, padded to a power of two, is cut into blocks of 2, of 4, .. tokens. Those pairs of a block whose key is
    in its first half and whose query is in its second are one product, of keys that have decayed to the block's middle
    and queries that decay from there: no factor is ever above 1.
    """

    def __init__(self, a: Tensor, scale: float) -> None:
        self.scale = scale
        self.length, self.size = a.shape[3], 1 << (a.shape[3] - 1).bit_length()
        # from the block's first token up to each token, and from after each token up to the block's last
        up_to = a.new_zeros(a.shape[:3].numel(), self.size, a.shape[4])
        up_to[:, : self.length] = a.flatten(0, 2)
        after = torch.zeros_like(up_to)
        self.levels = []
        while (half := 1 << len(self.levels)) < self.size:
            sums, rest = _halves(up_to, half), _halves(after, half)
            self.levels.append((sums[:, :, 1].exp().mul_(scale), rest[:, :, 0].exp()))
            rest[:, :, 0] += sums[:, :, 1, -1:]
            sums[:, :, 1] += sums[:, :, 0, -1:]
        self.total = up_to[:, -1, :, None].exp().unflatten(0, a.shape[:3])
        self.prefix = up_to[:, : self.length].exp().mul_(scale).unflatten(0, (-1, a.shape[2]))
        self.suffix = after[:, : self.length].exp().unflatten(0, (-1, a.shape[2]))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q.new_zeros(q.shape[0], self.size, self.size)
        scores.diagonal(dim1=1, dim2=2)[:, : self.length] = (q * k).sum(2).mul_(self.scale)
        for half, query, key, _, _ in self._products(q, k):
            _corners(scores, half).copy_(query @ key.mT)
        return scores[:, : self.length, : self.length]

    def scores_backward(
        self, q: Tensor, k: Tensor, scores: Tensor, d_scores: Tensor, outer: _Outer | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        del scores
        d_sums = None if outer is None else self._sums_gradients(q, k, outer)
        d_same = d_scores.diagonal(dim1=1, dim2=2)[..., None] * self.scale
        dq, dk = self._padded(d_same * k), self._padded(d_same * q)
        d_scores = self._padded(self._padded(d_scores).mT).mT
        for half, query, key, from_middle, to_middle in self._products(q, k):
            d_corners = _corners(d_scores, half)
            d_query, d_key = d_corners @ key, d_corners.mT @ query
            _halves(dq, half)[:, :, 1].addcmul_(d_query, from_middle)
            _halves(dk, half)[:, :, 0].addcmul_(d_key, to_middle)
            if d_sums is not None:
                # the sums of a block back to those of its halves, to which the pairs' terms are added
                sums, rest = (_halves(x, half) for x in d_sums)
                sums[:, :, 0, -1] += sums[:, :, 1].sum(2)
                sums[:, :, 1, -1] += rest[:, :, 0].sum(2)
                sums[:, :, 1].addcmul_(query, d_query)
                rest[:, :, 0].addcmul_(key, d_key)
        # blocks of one token: nothing follows it, and the sum up to it is its own log-decay
        d_a = None if d_sums is None else d_sums[0][:, : self.length]
        return dq[:, : self.length], dk[:, : self.length], d_a

    def _sums_gradients(self, q: Tensor, k: Tensor, outer: _Outer) -> tuple[Tensor, Tensor]:
        """Of the chunk's sums, up to each token and after it [G m K]: the gradients that come through the states."""
        up_to, after = q.new_zeros(2, q.shape[0], self.size, q.shape[2])
        if outer.d_query is not None:
            torch.mul(q, outer.d_query, out=up_to[:, : self.length])
        if outer.d_key is not None:
            torch.mul(k, outer.d_key, out=after[:, : self.length])
        if outer.decayed is not None:
            up_to[:, -1] += outer.decayed
        return up_to, after

    def _products(self, q: Tensor, k: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """Each size of a half, the largest first, its queries and keys [G n half K] as seen from the middle, and by
        what they decay."""
        q, k = self._padded(q), self._padded(k)
        for from_middle, to_middle in reversed(self.levels):
            half = to_middle.shape[2]
            query, key = _halves(q, half)[:, :, 1] * from_middle, _halves(k, half)[:, :, 0] * to_middle
            yield half, query, key, from_middle, to_middle

    def _padded(self, x: Tensor) -> Tensor:
        """Tokens [G m *] as many as a power of two."""
        return x if self.size == self.length else F.pad(x, (0, 0, 0, self.size - self.length))


class _FixedDecays:
    """log_decay None or [H]: the same in every chunk, so formed once for the longest; shorter ones use its ends."""

    def __init__(self, log_decay: Tensor | None, heads: int, size: int, scale: float, like: Tensor) -> None:
        token = torch.arange(size, device=like.device, dtype=like.dtype)
        self._distance = token[:, None] - token
        self.log_decay = log_decay
        self._formed: dict[int, _Chunk] = {}
        if log_decay is None:
            self._mask = (self._distance >= 0).to(like.dtype).mul_(scale).expand(1, heads, -1, -1)
            self._prefix, self._suffix = like.new_full((1, 1, size, 1), scale), None
            return
        a = log_decay.to(like.dtype)[None, :, None, None]
        self._mask = _times(self._distance, a).masked_fill_(self._distance < 0, float("-inf")).exp_().mul_(scale)
        self._prefix = _times(token[:, None] + 1, a).exp_().mul_(scale)
        self._suffix = _times(size - 1 - token[:, None], a).exp_()

    def chunks(self, group: Group) -> _Chunk:
        if group.length not in self._formed:
            self._formed[group.length] = self._chunks(group.length)
        return self._formed[group.length]

    def _chunks(self, m: int) -> _Chunk:
        mask, prefix = self._mask[..., :m, :m], self._prefix[:, :, :m]
        if self._suffix is None or self.log_decay is None:
            return _ScalarChunk(mask, prefix, None, None)
        suffix = self._suffix[:, :, self._suffix.shape[2] - m :]
        total = (self.log_decay.to(mask.dtype) * m).exp()[None, None, :, None, None]
        return _FixedChunk(mask, prefix, suffix, total, self._distance[:m, :m])


class _GivenDecays:
    """log_decay [B T H] or [B T H K]: formed group by group."""

    def __init__(self, log_decay: Tensor, scale: float, like: Tensor) -> None:
        self.log_decay, self.scale, self.dtype = log_decay, scale, like.dtype

    def chunks(self, group: Group) -> _Chunk:
        a = cut(self.log_decay, group).to(self.dtype)
        if a.ndim == 5:
            return _VectorChunk(a, self.scale)
        mask = _pair_sums(a.flatten(0, 2)[..., None])[..., 0].exp_().mul_(self.scale).unflatten(0, (-1, a.shape[2]))
        prefix = a.cumsum(3).exp_().mul_(self.scale).flatten(0, 1)[..., None]
        suffix = sum_after(a, 3).exp_().flatten(0, 1)[..., None]
        return _ScalarChunk(mask, prefix, suffix, a.sum(3).exp_()[..., None, None])


def _halves(x: Tensor, half: int) -> Tensor:
    """Tokens [G m *] as blocks of two halves, [G n 2 half *]; a view."""
    return x.unflatten(1, (-1, 2, half))


def _corners(scores: Tensor, half: int) -> Tensor:
    """Queries in the second half and keys in the first of every block: [G m m] -> [G n half half]; a view."""
    blocks = scores.unflatten(2, (-1, 2, half)).unflatten(1, (-1, 2, half))[:, :, 1, :, :, 0]
    return blocks.diagonal(dim1=1, dim2=3).movedim(3, 1)


def _times(count: Tensor, rate: Tensor) -> Tensor:
    """count * rate, where zero times -inf is zero."""
    return torch.where(count == 0, 0, count * rate)


def _pair_sums(a: Tensor) -> Tensor:
    """out[i, j] = a[j+1] + .. + a[i] for i >= j, else -inf: [G m K] -> [G m m K]."""
    later = torch.ones(a.shape[1], a.shape[1], dtype=torch.bool, device=a.device).tril(-1)[..., None]
    return torch.where(later, a[:, :, None], 0).cumsum(1).masked_fill_(later.transpose(0, 1), float("-inf"))


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """x [G * *] times a factor that broadcasts over [B H * *]."""
    return x if factor is None else (x.view(-1, factor.shape[1], *x.shape[1:]) * factor).flatten(0, 1)


def _among(x: Tensor, before: int, after: int) -> Tensor:
    """Products [G' m *] of some of a group's chunks among zeros for the rest, in rows of G."""
    return F.pad(x, (0, 0, 0, 0, before, after)) if before or after else x


class _DecayChunks(Chunks):
    def __init__(self, x: Recurrence, needs_log_decay: bool) -> None:
        self.most, self.needs_log_decay = most_chunks(x.k, x.v, x.chunk_size), needs_log_decay
        like = x.q.new_empty(0, dtype=x.wide)
        if x.log_decay is None or x.log_decay.ndim == 1:
            size = min(x.chunk_size, x.q.shape[1])
            self.decays = _FixedDecays(x.log_decay, x.q.shape[2], size, x.scale, like)
        else:
            self.decays = _GivenDecays(x.log_decay, x.scale, like)

    def forward(self, group: Group, x: Tokens, states: ChunkStates, exits: list[Tensor]) -> Tensor:
        chunks, entries = self.decays.chunks(group), states.entries
        tile = torch.bmm(chunks.scores(x.q, x.k), x.v)
        left = len(exits) * entries[0].shape[:2].numel()
        if left:
            changes = torch.bmm(_scaled(x.k, chunks.suffix)[:left].mT, x.v[:left]).view(-1, *entries.shape[1:])
            state = entries[0]
            for number, (change, place) in enumerate(zip(changes, exits, strict=True)):
                chunks.next_state(number, state, change, place)
                state = place
        if states.reading.start < tile.shape[0]:
            query = _scaled(x.q, chunks.prefix)[states.reading]
            tile[states.reading].baddbmm_(query, entries.flatten(0, 2)[states.reading])
        return tile

    def backward(
        self, group: Group, x: Tokens, d_out: Tensor, states: ChunkStates, d_states: Tensor, leaving: slice
    ) -> dict[str, Tensor]:
        chunks, entries, reading = self.decays.chunks(group), states.entries, states.reading
        total, before, after = x.q.shape[0], reading.start, x.q.shape[0] - leaving.stop
        d_exits, d_read, d_left, decayed = d_states[1:], None, None, None
        if before < total:
            changes = torch.bmm(_scaled(x.q, chunks.prefix)[reading].mT, d_out[reading]).view(-1, *entries.shape[1:])
            numbers = range(entries.shape[0])[-changes.shape[0] :]
            for number, change in zip(reversed(numbers), reversed(changes.unbind()), strict=True):
                chunks.next_state(number, d_exits[number], change, d_states[number])
            d_read = torch.bmm(d_out[reading], entries.flatten(0, 2)[reading].mT)
            d_read = _scaled(_among(d_read, before, 0), chunks.prefix)
        scores = chunks.scores(x.q, x.k)
        d_scores = torch.bmm(d_out, x.v.mT)
        d_value = torch.bmm(scores.mT, d_out)
        if after < total:
            exits = d_exits.flatten(0, 2)[leaving]
            d_left = _scaled(_among(torch.bmm(x.v[leaving], exits.mT), 0, after), chunks.suffix)
            d_value[leaving].baddbmm_(_scaled(x.k, chunks.suffix)[leaving], exits)
        if self.needs_log_decay and d_read is not None and d_left is not None:
            decayed = (chunks.decayed(entries) * d_exits).sum(4).flatten(0, 2)
        outer = _Outer(d_read, d_left, decayed) if self.needs_log_decay else None
        d_query, d_key, d_a = chunks.scores_backward(x.q, x.k, scores, d_scores, outer)
        if d_read is not None:
            d_query += d_read
        if d_left is not None:
            d_key += d_left
        found = {"q": d_query, "k": d_key, "v": d_value}
        return found if d_a is None else found | {"log_decay": d_a}


decay_chunkwise = chunkwise_kernel("decay_chunkwise", _DecayChunks)
