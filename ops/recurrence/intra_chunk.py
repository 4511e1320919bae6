"""Decays inside chunks, and scores of pairs of tokens with these decays, for the decay and the delta family.

Notation of decay/chunkwise.py. A token has r queries, which read the state, and c keys, which write it. The queries of
a token are adjacent rows, Q [G m*r K], and so are its keys, k [G m*c K]. The first query of a token also reads what its
own keys write; its other queries read only what keys of earlier tokens wrote, with the same decay:

    A_ij = scale sum_d Q_id k_jd exp(a_{j+1} + .. + a_i)_d      i the token of the query, j the token of the key

No decay is divided by another, so no factor is above 1, and no decay is computed as the difference of two sums. Either
would lose all digits where decays are strong, and give NaN for a log-decay of -inf.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .family import Recurrence
from .groups import Group, group_view, sum_after
from .products import product

Grads: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""Gradients dq, dk and da."""


class StateGradients(NamedTuple):
    """Gradients of a chunk's inputs through the states at its boundaries; None means zero."""

    d_query: Tensor | None
    """Gradient of the queries through the entry state, [G m*r K]."""
    d_key: Tensor | None
    """Gradient of the keys through the exit state, [G m*c K]."""
    d_total: Tensor | None
    """Gradient of the log-decay over the whole chunk, log g: <g * S, dS'>_V, [G K]."""


class ChunkDecays(ABC):
    """Decays of a group of chunks; each factor broadcasts over [n B H m K] with n B as one dimension."""

    prefix: Tensor | None
    """scale * p: decay from the chunk's start to each token; None means 1."""
    suffix: Tensor | None
    """s: decay from each token to the chunk's end; None means 1."""
    total: Tensor | None
    """g: decay over the whole chunk, [n|1 B|1 H K|1 1]; None means 1."""

    def apply_total(self, states: Tensor) -> Tensor:
        """Return g * S for the group's states [n B H K V]."""
        return states if self.total is None else states * self.total

    def next_state(self, number: int, state: Tensor, change: Tensor, out: Tensor) -> None:
        """Write g * S + change of one chunk of the group to `out`, each [B H K V]; `number` is the chunk's index."""
        if self.total is None:
            torch.add(state, change, out=out)
        else:
            torch.addcmul(change, state, self.total[number if len(self.total) > 1 else 0], out=out)

    @abstractmethod
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the scores A [G m*r m*c]."""

    @abstractmethod
    def sum_keys(self, pairs: Tensor, k: Tensor) -> Tensor:
        """Return sum_j scale pairs_ij k_j exp(a_{j+1} + .. + a_i), j <= i, of one key per token, [G m K].

        `pairs` is [G m m] and is overwritten.
        """

    @abstractmethod
    def scores_backward(
        self, q: Tensor, k: Tensor, scores: Tensor, d_scores: Tensor, through_states: StateGradients | None
    ) -> Grads:
        """Return the parts of dq and dk through A, and the whole of da.

        Args:
            q: queries, [G m*r K].
            k: keys, [G m*c K].
            scores: A, which is overwritten.
            d_scores: gradient of A, which is overwritten.
            through_states: gradients through the states, which da includes; None if da is not wanted: da is then
                returned as None.
        """


class _CausalMask:
    """Causal mask times a scale: the first query of a token also sees its own token, the others do not."""

    def __init__(self, scale: float, queries: int, size: int, like: Tensor) -> None:
        self.scale = scale
        causal = like.new_full((size, size), scale).tril()
        self._mask = torch.stack([causal, *[causal.tril(-1)] * (queries - 1)], dim=1)  # [m r m]

    def apply(self, decays: Tensor) -> Tensor:
        """Return the mask times the decays between tokens: [.. m m] -> [.. m*r m]."""
        m = decays.shape[-1]
        return (decays[..., None, :] * self._mask[:m, :, :m]).flatten(-3, -2)


class _ScalarChunk(ChunkDecays):
    """Decays shared by all key dimensions: A is a product times a mask, scale * D [n B|1 H|1 m*r m]."""

    def __init__(self, mask: Tensor, prefix: Tensor | None, suffix: Tensor | None, total: Tensor | None) -> None:
        self.mask = mask
        self.prefix = prefix
        self.suffix = suffix
        self.total = total

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self._apply_mask(product(q, k.mT))

    def sum_keys(self, pairs: Tensor, k: Tensor) -> Tensor:
        return product(self._apply_mask(pairs), k)

    def scores_backward(
        self, q: Tensor, k: Tensor, scores: Tensor, d_scores: Tensor, through_states: StateGradients | None
    ) -> Grads:
        d_a = None
        m = self.mask.shape[3]
        if through_states is not None:
            d_query, d_key, d_total = through_states
            d_prefix = None if d_query is None else _vecdot(q, d_query, m)
            d_suffix = None if d_key is None else _vecdot(k, d_key, m)
            d_total = None if d_total is None else d_total.sum(1)
            pairs = scores.mul_(d_scores)
            queries = pairs.shape[1] // m
            keys = pairs.shape[2] // m
            # faster than a sum over two inner dimensions
            pairs = reduce(torch.add, (pairs[:, r::queries, c::keys] for r in range(queries) for c in range(keys)))
            d_a = self._log_decay_gradient(pairs, d_prefix, d_suffix, d_total)
        d_products = self._apply_mask(d_scores)
        return product(d_products, k), product(d_products.mT, q), d_a

    def _log_decay_gradient(
        self, pairs: Tensor, d_prefix: Tensor | None, d_suffix: Tensor | None, d_total: Tensor | None
    ) -> Tensor:
        """Return the gradient of each token's log-decay, da [G m].

        Args:
            pairs: A * dA, summed over the queries and keys of a token, [G m m]; overwritten.
            d_prefix: gradient of each token's log p, [G m].
            d_suffix: gradient of each token's log s, [G m].
            d_total: gradient of log g, [G].
        """
        # entry [i, l] adds up what token i reads from the entry state and from the tokens before l
        before = pairs.roll(1, 2)
        before[..., 0] = 0 if d_prefix is None else d_prefix
        grad = before.cumsum(2).tril_().sum(1)
        if d_suffix is not None:
            grad[:, 1:] += d_suffix[:, :-1].cumsum(1)
        if d_total is not None:
            grad += d_total[:, None]
        return grad

    def _apply_mask(self, x: Tensor) -> Tensor:
        keys = x.shape[2] // self.mask.shape[3]
        x.view(-1, *self.mask.shape[1:], keys).mul_(self.mask[..., None])
        return x


class _FixedChunk(_ScalarChunk):
    """Decays that are equal for all tokens: da [G] counts each term once for every token over which it decays."""

    def __init__(
        self, mask: Tensor, prefix: Tensor | None, suffix: Tensor | None, total: Tensor | None, distance: Tensor
    ) -> None:
        super().__init__(mask, prefix, suffix, total)
        self.distance = distance

    def _log_decay_gradient(
        self, pairs: Tensor, d_prefix: Tensor | None, d_suffix: Tensor | None, d_total: Tensor | None
    ) -> Tensor:
        m = len(self.distance)
        token = self.distance[:, 0]
        grad = pairs.mul_(self.distance).sum((1, 2))
        if d_prefix is not None:
            grad += d_prefix @ (token + 1)
        if d_suffix is not None:
            grad += d_suffix @ (m - 1 - token)
        if d_total is not None:
            grad += m * d_total
        return grad


class _PerKeyChunk(ChunkDecays):
    """Decays per key dimension, a [n B H m K]: each pair's decay is split at the middle of the smallest common block.

    The chunk, padded to a power of two, is cut into blocks of 2, of 4, .. tokens. In each block, the pairs with the key
    in the first half and the query in the second half are one matrix product: of keys decayed up to the middle of the
    block, and queries with the decay from there on. So no factor is above 1.
    """

    def __init__(self, a: Tensor, mask: _CausalMask) -> None:
        self.scale = mask.scale
        self.length = a.shape[3]
        self.size = 1 << (a.shape[3] - 1).bit_length()
        # sums of a from the block's first token up to each token, and from after each token up to the block's last
        up_to = a.new_zeros(a.shape[:3].numel(), self.size, a.shape[4])
        up_to[:, : self.length] = a.flatten(0, 2)
        after = torch.zeros_like(up_to)
        self.levels = []
        while (half := 1 << len(self.levels)) < self.size:
            sums = _halves(up_to, half)
            later = _halves(after, half)
            self.levels.append((sums[:, :, 1].exp().mul_(self.scale), later[:, :, 0].exp()))
            later[:, :, 0] += sums[:, :, 1, -1:]
            sums[:, :, 1] += sums[:, :, 0, -1:]
        self.total = up_to[:, -1, :, None].exp().unflatten(0, a.shape[:3])
        self.prefix = up_to[:, : self.length].exp().mul_(self.scale).unflatten(0, (-1, a.shape[2]))
        self.suffix = after[:, : self.length].exp().unflatten(0, (-1, a.shape[2]))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        queries = q.shape[1] // self.length
        keys = k.shape[1] // self.length
        scores = q.new_zeros(q.shape[0], self.size * queries, self.size * keys)
        same_token = (q[:, ::queries, None] * k.unflatten(1, (-1, keys))).sum(3)
        self._same_token(scores)[:, : self.length] = same_token.mul_(self.scale)
        for half, query, key, _, _ in self._factors(q, k):
            _half_pairs(scores, half * queries, half * keys).copy_(query @ key.mT)
        return scores[:, : q.shape[1], : k.shape[1]]

    def sum_keys(self, pairs: Tensor, k: Tensor) -> Tensor:
        pairs = self._pad(self._pad(pairs, 1).mT, 1).mT
        k = self._pad(k, 1)
        sums = self._same_token(pairs) * k * self.scale
        for from_middle, to_middle in self.levels:
            half = to_middle.shape[2]
            key = _halves(k, half)[:, :, 0] * to_middle
            _halves(sums, half)[:, :, 1].addcmul_(_half_pairs(pairs, half, half) @ key, from_middle)
        return sums[:, : self.length]

    def scores_backward(
        self, q: Tensor, k: Tensor, scores: Tensor, d_scores: Tensor, through_states: StateGradients | None
    ) -> Grads:
        del scores
        queries = q.shape[1] // self.length
        keys = k.shape[1] // self.length
        d_sums = None if through_states is None else self._sums_gradients(q, k, through_states)
        d_scores = self._pad(self._pad(d_scores, queries).mT, keys).mT
        d_same_token = self._same_token(d_scores)[:, : self.length, :, None] * self.scale
        dq, dk = (q.new_zeros(q.shape[0], self.size * n, q.shape[2]) for n in (queries, keys))
        dq[:, : q.shape[1] : queries] = (d_same_token * k.unflatten(1, (-1, keys))).sum(2)
        dk[:, : k.shape[1]] = (d_same_token * q[:, ::queries, None]).flatten(1, 2)
        for half, query, key, from_middle, to_middle in self._factors(q, k):
            d_pairs = _half_pairs(d_scores, half * queries, half * keys)
            d_query = d_pairs @ key
            d_key = d_pairs.mT @ query
            _add_scaled_rows(_halves(dq, half * queries)[:, :, 1], d_query, from_middle)
            _add_scaled_rows(_halves(dk, half * keys)[:, :, 0], d_key, to_middle)
            if d_sums is not None:
                # from the gradients of a block's sums to those of its halves' sums; the pairs add their terms
                sums, later = (_halves(x, half) for x in d_sums)
                sums[:, :, 0, -1] += sums[:, :, 1].sum(2)
                sums[:, :, 1, -1] += later[:, :, 0].sum(2)
                _add_products(sums[:, :, 1], query, d_query)
                _add_products(later[:, :, 0], key, d_key)
        # in a block of one token, the sum up to the token is its own log-decay, and no token is later
        d_a = None if d_sums is None else d_sums[0][:, : self.length]
        return dq[:, : q.shape[1]], dk[:, : k.shape[1]], d_a

    def _sums_gradients(self, q: Tensor, k: Tensor, through_states: StateGradients) -> tuple[Tensor, Tensor]:
        """Return the gradients of the chunk's sums, up to each token and after it, through the states: [G m K] each."""
        up_to, after = q.new_zeros(2, q.shape[0], self.size, q.shape[2])
        if through_states.d_query is not None:
            _add_products(up_to[:, : self.length], q, through_states.d_query)
        if through_states.d_key is not None:
            _add_products(after[:, : self.length], k, through_states.d_key)
        if through_states.d_total is not None:
            up_to[:, -1] += through_states.d_total
        return up_to, after

    def _factors(self, q: Tensor, k: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """Yield the factors of the scores for each block size, the largest first.

        A tuple has the number of tokens in half a block, the decayed queries [G n half*r K] and keys [G n half*c K],
        and the decays of the queries (from the middle of the block) and of the keys (to the middle).
        """
        queries = q.shape[1] // self.length
        keys = k.shape[1] // self.length
        q = self._pad(q, queries)
        k = self._pad(k, keys)
        for from_middle, to_middle in reversed(self.levels):
            half = to_middle.shape[2]
            query = scale_rows(_halves(q, half * queries)[:, :, 1], from_middle)
            key = scale_rows(_halves(k, half * keys)[:, :, 0], to_middle)
            yield half, query, key, from_middle, to_middle

    def _pad(self, x: Tensor, rows: int) -> Tensor:
        """Pad x [G m*rows *], with `rows` rows per token, to a number of tokens that is a power of two."""
        return x if self.size == self.length else F.pad(x, (0, 0, 0, (self.size - self.length) * rows))

    def _same_token(self, scores: Tensor) -> Tensor:
        """Return the scores of each token's first query with its own keys, a view [G size c] of [G size*r size*c]."""
        blocks = scores.unflatten(2, (self.size, -1)).unflatten(1, (self.size, -1))
        return blocks[:, :, 0].diagonal(dim1=1, dim2=2).mT


def count_product_pairs(tokens: int) -> int:
    """Return the number of token pairs whose scores are matrix products, in a chunk with decays per key dimension.

    These are the pairs of two different tokens, each once, after padding to a power of two of tokens.
    """
    size = 1 << max(tokens - 1, 0).bit_length()
    return size * (size - 1) // 2


class _FixedDecays:
    """Decays for log_decay None or [H], equal in every chunk.

    They are computed once for the longest chunk; shorter chunks use a part of them.
    """

    def __init__(self, log_decay: Tensor | None, size: int, mask: _CausalMask, like: Tensor) -> None:
        token = torch.arange(size, device=like.device, dtype=like.dtype)
        self._distance = token[:, None] - token
        self.log_decay = log_decay
        self._mask = mask
        self._by_length: dict[int, ChunkDecays] = {}
        if log_decay is None:
            self._pairs = like.new_ones(1, 1, size, size)
            self._prefix = None if mask.scale == 1 else like.new_full((1, 1, size, 1), mask.scale)
            self._suffix = None
            return
        a = log_decay.to(like.dtype)[None, :, None, None]
        self._pairs = _multiply(self._distance.clamp(min=0), a).exp_()
        self._prefix = _multiply(token[:, None] + 1, a).exp_().mul_(mask.scale)
        self._suffix = _multiply(size - 1 - token[:, None], a).exp_()

    def chunks(self, group: Group) -> ChunkDecays:
        if group.length not in self._by_length:
            self._by_length[group.length] = self._chunks(group.length)
        return self._by_length[group.length]

    def _chunks(self, m: int) -> ChunkDecays:
        mask = self._mask.apply(self._pairs[..., :m, :m])
        prefix = None if self._prefix is None else self._prefix[:, :, :m]
        if self._suffix is None or self.log_decay is None:
            return _ScalarChunk(mask, prefix, None, None)
        suffix = self._suffix[:, :, self._suffix.shape[2] - m :]
        total = (self.log_decay.to(mask.dtype) * m).exp()[None, None, :, None, None]
        return _FixedChunk(mask, prefix, suffix, total, self._distance[:m, :m])


class _TokenDecays:
    """Decays for log_decay [B T H] or [B T H K], computed group by group."""

    def __init__(self, log_decay: Tensor, mask: _CausalMask, like: Tensor) -> None:
        self.log_decay = log_decay
        self._mask = mask
        self.dtype = like.dtype

    def chunks(self, group: Group) -> ChunkDecays:
        a = group_view(self.log_decay, group).to(self.dtype)
        if a.ndim == 5:
            return _PerKeyChunk(a, self._mask)
        m = a.shape[3]
        rows = a.flatten(0, 2)
        later = torch.ones(m, m, dtype=torch.bool, device=a.device).tril(-1)
        # entry [i, j] adds up a[l] for j < l <= i; it is 0 above the diagonal
        pairs = torch.where(later, rows[:, :, None], 0).cumsum_(1).exp_().unflatten(0, (-1, a.shape[2]))
        prefix = a.cumsum(3).exp_().mul_(self._mask.scale).flatten(0, 1)[..., None]
        suffix = sum_after(a, 3).exp_().flatten(0, 1)[..., None]
        return _ScalarChunk(self._mask.apply(pairs), prefix, suffix, a.sum(3).exp_()[..., None, None])


def make_decays(x: Recurrence, scale: float, queries: int = 1) -> _FixedDecays | _TokenDecays:
    """Build the decays of a call. Method `chunks` of the result returns the decays inside the chunks of a group.

    Scores are multiplied by `scale`. Each token has `queries` queries: 1 in the decay family, 2 in the delta family.
    """
    like = x.q.new_empty(0, dtype=x.wide_dtype)
    size = min(x.chunk_size, x.q.shape[1])
    mask = _CausalMask(scale, queries, size, like)
    if x.log_decay is None or x.log_decay.ndim == 1:
        return _FixedDecays(x.log_decay, size, mask, like)
    return _TokenDecays(x.log_decay, mask, like)


def scale_tokens(x: Tensor, factor: Tensor | None) -> Tensor:
    """Return x [G m*r *] times a factor per token [nB|1 H|1 m *], in the dtype of x; None means 1."""
    if factor is None:
        return x
    return scale_rows(x.unflatten(0, (-1, factor.shape[1])), factor).flatten(0, 1).to(x.dtype)


def scale_rows(x: Tensor, factor: Tensor) -> Tensor:
    """Return rows [.. m*r *] times a factor per token [.. m *]."""
    rows = x.shape[-2] // factor.shape[-2]
    return x * factor if rows == 1 else (x.unflatten(-2, (-1, rows)) * factor[..., None, :]).flatten(-3, -2)


def _add_scaled_rows(out: Tensor, x: Tensor, factor: Tensor) -> None:
    """Add `scale_rows(x, factor)` to `out`, which may be a view."""
    rows = (-1, x.shape[-2] // factor.shape[-2])
    out.unflatten(-2, rows).addcmul_(x.unflatten(-2, rows), factor[..., None, :])


def _add_products(out: Tensor, x: Tensor, y: Tensor) -> None:
    """Add the elementwise products of rows [.. m*r K], summed over the rows of a token, to a view [.. m K]."""
    rows = x.shape[-2] // out.shape[-2]
    if rows == 1:
        out.addcmul_(x, y)
    else:
        out += (x * y).unflatten(-2, (-1, rows)).sum(-2)


def pad_rows(x: Tensor, before: int, after: int) -> Tensor:
    """Pad x [G' m *], which has some chunks of a group, with zeros for the others: `before` and `after` rows of G."""
    return F.pad(x, (0, 0, 0, 0, before, after)) if before or after else x


def _halves(x: Tensor, half: int) -> Tensor:
    """Return tokens [G m *] as blocks of two halves, a view [G n 2 half *]."""
    return x.unflatten(1, (-1, 2, half))


def _half_pairs(scores: Tensor, queries: int, keys: int) -> Tensor:
    """Return the scores of queries in the second half and keys in the first half of each block.

    The result is a view [G n queries keys] of [G * *]; `queries` and `keys` are the rows of half a block.
    """
    blocks = scores.unflatten(2, (-1, 2, keys)).unflatten(1, (-1, 2, queries))[:, :, 1, :, :, 0]
    return blocks.diagonal(dim1=1, dim2=3).movedim(3, 1)


def _multiply(count: Tensor, rate: Tensor) -> Tensor:
    """Return count * rate, where zero times -inf is zero."""
    return torch.where(count == 0, 0, count * rate)


def _vecdot(x: Tensor, y: Tensor, tokens: int) -> Tensor:
    """Return the inner products of the rows of x and y [G m*r K], summed over the rows of a token: [G m]."""
    return torch.linalg.vecdot(*(a.reshape(a.shape[0], tokens, -1).to(y.dtype) for a in (x, y)))
