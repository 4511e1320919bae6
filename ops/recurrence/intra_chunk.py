"""The decays inside chunks, and the products of pairs of tokens that they weigh: for the decay and the delta family.

Notation of decay/chunkwise.py. A token has r queries, which read the state, and c keys, which write it; those of a
token are neighbours, Q [G m*r K] and k [G m*c K]. The first query of a token reads what its own keys wrote, any others
only what keys of tokens before wrote, decayed as far:

    A_ij = scale sum_d Q_id k_jd exp(a_{j+1} + .. + a_i)_d      i, j the tokens of the two

No factor is ever above 1, and no decay is the difference of two sums: both would lose all digits where decays are
strong, and -inf would be NaN.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .family import Recurrence
from .groups import Group, cut, sum_after
from .products import product

Grads: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""dq, dk and da."""


class Outer(NamedTuple):
    """What of a chunk's gradients came through the states; None is 0."""

    d_query: Tensor | None
    """[G m*r K]."""
    d_key: Tensor | None
    """[G m*c K]."""
    decayed: Tensor | None
    """<g * S, dS'>_V, [G K]."""


class ChunkDecays(ABC):
    """The decays of a group of chunks; each factor broadcasts over [n B H m K] with n B as one dimension."""

    prefix: Tensor | None
    """scale * p; None is 1."""
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
        """A [G m*r m*c]."""

    @abstractmethod
    def scores_backward(self, q: Tensor, k: Tensor, scores: Tensor, d_scores: Tensor, outer: Outer | None) -> Grads:
        """The parts of dq and dk that come through A, and the whole of da; consumes scores and d_scores, A's.

        `outer` is what comes through the states; None if da is not wanted, which then is None too.
        """


class _Reads:
    """What the r queries of a token see: the first its own token too, others only tokens before; times a scale."""

    def __init__(self, scale: float, readers: int, size: int, like: Tensor) -> None:
        self.scale = scale
        causal = like.new_full((size, size), scale).tril()
        self._seen = torch.stack([causal, *[causal.tril(-1)] * (readers - 1)], dim=1)  # [m r m]

    def mask(self, decays: Tensor) -> Tensor:
        """The mask of the pairs, from decays between tokens [.. m m]."""
        m = decays.shape[-1]
        return (decays[..., None, :] * self._seen[:m, :, :m]).flatten(-3, -2)


class _ScalarChunk(ChunkDecays):
    """One decay for all key dimensions: A is a product with a mask scale * D [n B|1 H|1 m*r m]."""

    def __init__(self, mask: Tensor, prefix: Tensor | None, suffix: Tensor | None, total: Tensor | None) -> None:
        self.mask = mask
        self.prefix = prefix
        self.suffix = suffix
        self.total = total

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self._masked(product(q, k.mT))

    def scores_backward(self, q: Tensor, k: Tensor, scores: Tensor, d_scores: Tensor, outer: Outer | None) -> Grads:
        d_a, m = None, self.mask.shape[3]
        if outer is not None:
            read = None if outer.d_query is None else _vecdot(q, outer.d_query, m)
            left = None if outer.d_key is None else _vecdot(k, outer.d_key, m)
            decayed = None if outer.decayed is None else outer.decayed.sum(1)
            pairs = scores.mul_(d_scores)
            readers = pairs.shape[1] // m
            keys = pairs.shape[2] // m
            # faster than a sum over two inner dimensions
            pairs = reduce(torch.add, (pairs[:, r::readers, c::keys] for r in range(readers) for c in range(keys)))
            d_a = self._log_decay_gradient(pairs, read, left, decayed)
        d_products = self._masked(d_scores)
        return product(d_products, k), product(d_products.mT, q), d_a

    def _log_decay_gradient(
        self, pairs: Tensor, read: Tensor | None, left: Tensor | None, decayed: Tensor | None
    ) -> Tensor:
        """da [G m], of A * dA by token, which is consumed, of what each token read of the entry state [G m], what it
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
        keys = x.shape[2] // self.mask.shape[3]
        x.view(-1, *self.mask.shape[1:], keys).mul_(self.mask[..., None])
        return x


class _FixedChunk(_ScalarChunk):
    """The same decay for all tokens: da [G] is theirs together, every term as often as it was decayed."""

    def __init__(
        self, mask: Tensor, prefix: Tensor | None, suffix: Tensor | None, total: Tensor | None, distance: Tensor
    ) -> None:
        super().__init__(mask, prefix, suffix, total)
        self.distance = distance

    def _log_decay_gradient(
        self, pairs: Tensor, read: Tensor | None, left: Tensor | None, decayed: Tensor | None
    ) -> Tensor:
        m = len(self.distance)
        count = self.distance[:, 0]
        grad = pairs.mul_(self.distance).sum((1, 2))
        if read is not None:
            grad += read @ (count + 1)
        if left is not None:
            grad += left @ (m - 1 - count)
        if decayed is not None:
            grad += m * decayed
        return grad


class _PerKeyChunk(ChunkDecays):
    """One decay per key dimension, a [n B H m K]: every pair by way of the middle of the smallest block that holds it.

    The chunk, padded to a power of two, is cut into blocks of 2, of 4, .. tokens. Those pairs of a block whose key is
    in its first half and whose query is in its second are one product, of keys that have decayed to the block's middle
    and queries that decay from there: no factor is ever above 1.
    """

    def __init__(self, a: Tensor, reads: _Reads) -> None:
        self.scale = reads.scale
        self.length = a.shape[3]
        self.size = 1 << (a.shape[3] - 1).bit_length()
        # from the block's first token up to each token, and from after each token up to the block's last
        up_to = a.new_zeros(a.shape[:3].numel(), self.size, a.shape[4])
        up_to[:, : self.length] = a.flatten(0, 2)
        after = torch.zeros_like(up_to)
        self.levels = []
        while (half := 1 << len(self.levels)) < self.size:
            sums = _halves(up_to, half)
            rest = _halves(after, half)
            self.levels.append((sums[:, :, 1].exp().mul_(self.scale), rest[:, :, 0].exp()))
            rest[:, :, 0] += sums[:, :, 1, -1:]
            sums[:, :, 1] += sums[:, :, 0, -1:]
        self.total = up_to[:, -1, :, None].exp().unflatten(0, a.shape[:3])
        self.prefix = up_to[:, : self.length].exp().mul_(self.scale).unflatten(0, (-1, a.shape[2]))
        self.suffix = after[:, : self.length].exp().unflatten(0, (-1, a.shape[2]))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        readers = q.shape[1] // self.length
        keys = k.shape[1] // self.length
        scores = q.new_zeros(q.shape[0], self.size * readers, self.size * keys)
        own = (q[:, ::readers, None] * k.unflatten(1, (-1, keys))).sum(3)
        self._own(scores)[:, : self.length] = own.mul_(self.scale)
        for half, query, key, _, _ in self._products(q, k):
            _corners(scores, half * readers, half * keys).copy_(query @ key.mT)
        return scores[:, : q.shape[1], : k.shape[1]]

    def scores_backward(self, q: Tensor, k: Tensor, scores: Tensor, d_scores: Tensor, outer: Outer | None) -> Grads:
        del scores
        readers = q.shape[1] // self.length
        keys = k.shape[1] // self.length
        d_sums = None if outer is None else self._sums_gradients(q, k, outer)
        d_scores = self._padded(self._padded(d_scores, readers).mT, keys).mT
        d_own = self._own(d_scores)[:, : self.length, :, None] * self.scale
        dq, dk = (q.new_zeros(q.shape[0], self.size * n, q.shape[2]) for n in (readers, keys))
        dq[:, : q.shape[1] : readers] = (d_own * k.unflatten(1, (-1, keys))).sum(2)
        dk[:, : k.shape[1]] = (d_own * q[:, ::readers, None]).flatten(1, 2)
        for half, query, key, from_middle, to_middle in self._products(q, k):
            d_corners = _corners(d_scores, half * readers, half * keys)
            d_query = d_corners @ key
            d_key = d_corners.mT @ query
            _add_weighed(_halves(dq, half * readers)[:, :, 1], d_query, from_middle)
            _add_weighed(_halves(dk, half * keys)[:, :, 0], d_key, to_middle)
            if d_sums is not None:
                # the sums of a block back to those of its halves, to which the pairs' terms are added
                sums, rest = (_halves(x, half) for x in d_sums)
                sums[:, :, 0, -1] += sums[:, :, 1].sum(2)
                sums[:, :, 1, -1] += rest[:, :, 0].sum(2)
                _add_products(sums[:, :, 1], query, d_query)
                _add_products(rest[:, :, 0], key, d_key)
        # blocks of one token: nothing follows it, and the sum up to it is its own log-decay
        d_a = None if d_sums is None else d_sums[0][:, : self.length]
        return dq[:, : q.shape[1]], dk[:, : k.shape[1]], d_a

    def _sums_gradients(self, q: Tensor, k: Tensor, outer: Outer) -> tuple[Tensor, Tensor]:
        """Of the chunk's sums, up to each token and after it [G m K]: the gradients that come through the states."""
        up_to, after = q.new_zeros(2, q.shape[0], self.size, q.shape[2])
        if outer.d_query is not None:
            _add_products(up_to[:, : self.length], q, outer.d_query)
        if outer.d_key is not None:
            _add_products(after[:, : self.length], k, outer.d_key)
        if outer.decayed is not None:
            up_to[:, -1] += outer.decayed
        return up_to, after

    def _products(self, q: Tensor, k: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """Each size of a half, the largest first, its queries and keys [G n half*r K] as seen from the middle, and by
        what they decay."""
        readers = q.shape[1] // self.length
        keys = k.shape[1] // self.length
        q, k = self._padded(q, readers), self._padded(k, keys)
        for from_middle, to_middle in reversed(self.levels):
            half = to_middle.shape[2]
            query = weighed(_halves(q, half * readers)[:, :, 1], from_middle)
            key = weighed(_halves(k, half * keys)[:, :, 0], to_middle)
            yield half, query, key, from_middle, to_middle

    def _padded(self, x: Tensor, rows: int) -> Tensor:
        """Tokens [G m*rows *] as many as a power of two."""
        return x if self.size == self.length else F.pad(x, (0, 0, 0, (self.size - self.length) * rows))

    def _own(self, scores: Tensor) -> Tensor:
        """What the first query of each token reads of the token's own keys, [G size*r size*c] -> [G size c]; a view."""
        blocks = scores.unflatten(2, (self.size, -1)).unflatten(1, (self.size, -1))
        return blocks[:, :, 0].diagonal(dim1=1, dim2=2).mT


def pairs_by_halves(tokens: int) -> int:
    """Pairs of a chunk's tokens that are formed by halves where every key dimension decays by itself: those of
    different tokens, once, of as many as a power of two."""
    size = 1 << max(tokens - 1, 0).bit_length()
    return size * (size - 1) // 2


class _FixedDecays:
    """log_decay None or [H]: the same in every chunk, so formed once for the longest; shorter ones use its ends."""

    def __init__(self, log_decay: Tensor | None, size: int, reads: _Reads, like: Tensor) -> None:
        token = torch.arange(size, device=like.device, dtype=like.dtype)
        self._distance = token[:, None] - token
        self.log_decay = log_decay
        self._reads = reads
        self._formed: dict[int, ChunkDecays] = {}
        if log_decay is None:
            self._pairs = like.new_ones(1, 1, size, size)
            self._prefix = None if reads.scale == 1 else like.new_full((1, 1, size, 1), reads.scale)
            self._suffix = None
            return
        a = log_decay.to(like.dtype)[None, :, None, None]
        self._pairs = _times(self._distance.clamp(min=0), a).exp_()
        self._prefix = _times(token[:, None] + 1, a).exp_().mul_(reads.scale)
        self._suffix = _times(size - 1 - token[:, None], a).exp_()

    def chunks(self, group: Group) -> ChunkDecays:
        if group.length not in self._formed:
            self._formed[group.length] = self._chunks(group.length)
        return self._formed[group.length]

    def _chunks(self, m: int) -> ChunkDecays:
        mask = self._reads.mask(self._pairs[..., :m, :m])
        prefix = None if self._prefix is None else self._prefix[:, :, :m]
        if self._suffix is None or self.log_decay is None:
            return _ScalarChunk(mask, prefix, None, None)
        suffix = self._suffix[:, :, self._suffix.shape[2] - m :]
        total = (self.log_decay.to(mask.dtype) * m).exp()[None, None, :, None, None]
        return _FixedChunk(mask, prefix, suffix, total, self._distance[:m, :m])


class _GivenDecays:
    """log_decay [B T H] or [B T H K]: formed group by group."""

    def __init__(self, log_decay: Tensor, reads: _Reads, like: Tensor) -> None:
        self.log_decay = log_decay
        self._reads = reads
        self.dtype = like.dtype

    def chunks(self, group: Group) -> ChunkDecays:
        a = cut(self.log_decay, group).to(self.dtype)
        if a.ndim == 5:
            return _PerKeyChunk(a, self._reads)
        m = a.shape[3]
        rows = a.flatten(0, 2)
        later = torch.ones(m, m, dtype=torch.bool, device=a.device).tril(-1)
        # entry [i, j] adds up a[l] for j < l <= i; it is 0 above the diagonal
        pairs = torch.where(later, rows[:, :, None], 0).cumsum_(1).exp_().unflatten(0, (-1, a.shape[2]))
        prefix = a.cumsum(3).exp_().mul_(self._reads.scale).flatten(0, 1)[..., None]
        suffix = sum_after(a, 3).exp_().flatten(0, 1)[..., None]
        return _ScalarChunk(self._reads.mask(pairs), prefix, suffix, a.sum(3).exp_()[..., None, None])


def decays_of(x: Recurrence, scale: float, readers: int = 1) -> _FixedDecays | _GivenDecays:
    """The decays of a call, whose `chunks` are those of a group; `readers` is r."""
    like = x.q.new_empty(0, dtype=x.wide)
    size = min(x.chunk_size, x.q.shape[1])
    reads = _Reads(scale, readers, size, like)
    if x.log_decay is None or x.log_decay.ndim == 1:
        return _FixedDecays(x.log_decay, size, reads, like)
    return _GivenDecays(x.log_decay, reads, like)


def scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    """x [G m*r *] times a factor [nB|1 H|1 m *] of tokens, in the dtype of x; None is 1."""
    return x if factor is None else weighed(x.unflatten(0, (-1, factor.shape[1])), factor).flatten(0, 1).to(x.dtype)


def weighed(x: Tensor, factor: Tensor) -> Tensor:
    """Rows [.. m*r *] times a factor [.. m *] of tokens."""
    rows = x.shape[-2] // factor.shape[-2]
    return x * factor if rows == 1 else (x.unflatten(-2, (-1, rows)) * factor[..., None, :]).flatten(-3, -2)


def _add_weighed(out: Tensor, x: Tensor, factor: Tensor) -> None:
    """Add to a view what `weighed` makes."""
    rows = (-1, x.shape[-2] // factor.shape[-2])
    out.unflatten(-2, rows).addcmul_(x.unflatten(-2, rows), factor[..., None, :])


def _add_products(out: Tensor, x: Tensor, y: Tensor) -> None:
    """Add to a view [.. m K] the products of rows [.. m*r K], summed over those of a token."""
    rows = x.shape[-2] // out.shape[-2]
    if rows == 1:
        out.addcmul_(x, y)
    else:
        out += (x * y).unflatten(-2, (-1, rows)).sum(-2)


def among(x: Tensor, before: int, after: int) -> Tensor:
    """Products [G' m *] of some of a group's chunks among zeros for the rest, in rows of G."""
    return F.pad(x, (0, 0, 0, 0, before, after)) if before or after else x


def _halves(x: Tensor, half: int) -> Tensor:
    """Tokens [G m *] as blocks of two halves, [G n 2 half *]; a view."""
    return x.unflatten(1, (-1, 2, half))


def _corners(scores: Tensor, queries: int, keys: int) -> Tensor:
    """Queries in the second half and keys in the first of every block, so many: [G * *] -> [G n queries keys]; a
    view."""
    blocks = scores.unflatten(2, (-1, 2, keys)).unflatten(1, (-1, 2, queries))[:, :, 1, :, :, 0]
    return blocks.diagonal(dim1=1, dim2=3).movedim(3, 1)


def _times(count: Tensor, rate: Tensor) -> Tensor:
    """count * rate, where zero times -inf is zero."""
    return torch.where(count == 0, 0, count * rate)


def _vecdot(x: Tensor, y: Tensor, tokens: int) -> Tensor:
    """Products of rows [G m*r K], summed over all that a token has: [G m]."""
    return torch.linalg.vecdot(*(a.reshape(a.shape[0], tokens, -1).to(y.dtype) for a in (x, y)))
