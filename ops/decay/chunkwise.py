"""The decay family's chunkwise op, with its own backward.

Per chunk of m tokens with entry state S and exit state S' (notation of decay.py; i, j count from 0 inside the chunk):

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

The forward keeps the chunks' entry states only; the backward recomputes the rest. Only states wait for each other: what
is inside chunks is formed for a group of n of them at once (chunks.py). A ragged last chunk is simply shorter: nothing
is padded.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import CustomOpDef  # torch.library does not export what its decorator returns

from ..chunks import Group, capacity, cut, groups, most_chunks, operand, store
from ..packing import stretches


class _Outer(NamedTuple):
    """What of a chunk's gradients came through the states; None is 0."""

    d_query: Tensor | None
    """[G m K]."""
    d_key: Tensor | None
    """[G m K]."""
    kept: Tensor | None
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
        """The parts of dq and dk that come through A, and the whole of da; consumes scores and d_scores.

        Args:
            q: [G m K].
            k: [G m K].
            scores: A.
            d_scores: its gradient.
            outer: what comes through the states; None if da is not wanted, which then is None too.
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
            kept = None if outer.kept is None else outer.kept.sum(1)
            d_a = self._log_decay_gradient(scores.mul_(d_scores), read, left, kept)
        d_products = self._masked(d_scores)
        return torch.bmm(d_products, k), torch.bmm(d_products.mT, q), d_a

    def _log_decay_gradient(
        self, pairs: Tensor, read: Tensor | None, left: Tensor | None, kept: Tensor | None
    ) -> Tensor:
        """da [G m].

        Args:
            pairs: A * (do v^T), [G m m]; consumed.
            read: what each query read of the entry state, [G m].
            left: what each key left in the exit state, [G m].
            kept: what the entry state left there, [G].
        """
        # entry [i, l] adds up what token i read of the tokens before l, the entry state first
        before = pairs.roll(1, 2)
        before[..., 0] = 0 if read is None else read
        grad = before.cumsum(2).tril_().sum(1)
        if left is not None:
            grad[:, 1:] += left[:, :-1].cumsum(1)
        if kept is not None:
            grad += kept[:, None]
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
        self, pairs: Tensor, read: Tensor | None, left: Tensor | None, kept: Tensor | None
    ) -> Tensor:
        m, count = len(self.distance), self.distance[:, 0]
        grad = pairs.mul_(self.distance).sum((1, 2))
        if read is not None:
            grad += read @ (count + 1)
        if left is not None:
            grad += left @ (m - 1 - count)
        if kept is not None:
            grad += m * kept
        return grad


class _VectorChunk(_Chunk):
    """A decay a key dimension, a [n B H m K]: every pair by way of the middle of the smallest block that holds it.

    The chunk, padded to a power of two, is cut into blocks of 2, of 4, .. tokens. Those pairs of a block whose key is
    in its first half and whose query is in its second are one product, of keys that have decayed to the block's middle
    and queries that decay from there: no factor is ever above 1.
    """

    def __init__(self, a: Tensor, scale: float) -> None:
        self.scale = scale
        self.length, self.size = a.shape[3], 1 << (a.shape[3] - 1).bit_length()
        # from the block's first token up to each token, and from behind each token up to the block's last
        up_to = a.new_zeros(a.shape[:3].numel(), self.size, a.shape[4])
        up_to[:, : self.length] = a.flatten(0, 2)
        behind = torch.zeros_like(up_to)
        self.levels = []
        while (half := 1 << len(self.levels)) < self.size:
            sums, rest = _halves(up_to, half), _halves(behind, half)
            self.levels.append((sums[:, :, 1].exp().mul_(scale), rest[:, :, 0].exp()))
            rest[:, :, 0] += sums[:, :, 1, -1:]
            sums[:, :, 1] += sums[:, :, 0, -1:]
        self.total = up_to[:, -1, :, None].exp().unflatten(0, a.shape[:3])
        self.prefix = up_to[:, : self.length].exp().mul_(scale).unflatten(0, (-1, a.shape[2]))
        self.suffix = behind[:, : self.length].exp().unflatten(0, (-1, a.shape[2]))

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
        # blocks of one token: nothing is behind it, and the sum up to it is its own log-decay
        d_a = None if d_sums is None else d_sums[0][:, : self.length]
        return dq[:, : self.length], dk[:, : self.length], d_a

    def _sums_gradients(self, q: Tensor, k: Tensor, outer: _Outer) -> tuple[Tensor, Tensor]:
        """Of the chunk's sums, up to each token and behind it [G m K]: the gradients that come through the states."""
        up_to, behind = q.new_zeros(2, q.shape[0], self.size, q.shape[2])
        if outer.d_query is not None:
            torch.mul(q, outer.d_query, out=up_to[:, : self.length])
        if outer.d_key is not None:
            torch.mul(k, outer.d_key, out=behind[:, : self.length])
        if outer.kept is not None:
            up_to[:, -1] += outer.kept
        return up_to, behind

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


def _decays(
    log_decay: Tensor | None, q: Tensor, scale: float, chunk_size: int, like: Tensor
) -> "_FixedDecays | _GivenDecays":
    if log_decay is None or log_decay.ndim == 1:
        return _FixedDecays(log_decay, q.shape[2], min(chunk_size, q.shape[1]), scale, like)
    return _GivenDecays(log_decay, scale, like)


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


def sum_after(a: Tensor, dim: int) -> Tensor:
    """out[j] = a[j+1] + .. + a[last] along `dim`."""
    out = torch.zeros_like(a)
    later = a.narrow(dim, 1, a.shape[dim] - 1)
    out.narrow(dim, 0, a.shape[dim] - 1).copy_(later.flip(dim).cumsum(dim).flip(dim))
    return out


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


@torch.library.custom_op("seqmix::decay_chunkwise", mutates_args=())
def chunkwise_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    output_final_state: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state [N H K V] and chunk entry states [chunks B H K V]; the last two are empty unless wanted."""
    wide = torch.promote_types(q.dtype, torch.float32)
    output, final_state, entries = _allocate(
        q, k, v, log_decay, initial_state, cu_seqlens, scale, chunk_size, output_final_state, save_states
    )
    rows = q.shape[0] * q.shape[2]
    most = most_chunks(k, v, chunk_size)
    shape = (q.shape[0], *q.shape[2:], v.shape[3])
    index = 0
    with torch.autocast(q.device.type, enabled=False):
        decays = _decays(log_decay, q, scale, chunk_size, q.new_empty(0, dtype=wide))
        room = entries if save_states else q.new_empty((most + 1, *shape), dtype=wide)
        for stretch in stretches(q.shape[0], q.shape[1], cu_seqlens):
            state = None if initial_state is None else initial_state[stretch.rows]
            for group in groups(stretch, chunk_size, most):
                first, last = group.start == stretch.start, group.stop == stretch.stop
                # the states before each chunk and behind the last, each formed in its place
                at = index if save_states else 0
                entered = room[at : at + group.chunks]
                states = [*entered]
                if not last:
                    states.append(room[at + group.chunks])
                elif output_final_state:
                    states.append(final_state[stretch.rows])
                if state is None:
                    states[0].zero_()
                elif first or not save_states:
                    states[0].copy_(state)
                query, key, value = (operand(x, group, wide) for x in (q, k, v))
                # nothing is read of a state that is 0
                reading = slice(rows if state is None else 0, None)
                tile = _group_forward(decays.chunks(group), query, key, value, entered, states, reading)
                store(output, group, tile)
                index, state = index + group.chunks, states[-1]
            if output_final_state and state is not None and stretch.start == stretch.stop:
                final_state[stretch.rows].copy_(state)
    if save_states:
        entries[index:].zero_()  # documents that end in one chunk leave rows over
    return output, final_state, entries


def _group_forward(
    chunks: _Chunk,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    entered: Tensor,
    states: list[Tensor],
    reading: slice,
) -> Tensor:
    """The output [G m V] of a group's G chunks.

    Args:
        chunks: their decays.
        query: [G m K].
        key: [G m K].
        value: [G m V].
        entered: the states before each chunk, [n B H K V].
        states: the same one by one, and the one behind the last if it is wanted; all but the first are written.
        reading: those of G that read a state which may be other than 0.
    """
    tile = torch.bmm(chunks.scores(query, key), value)
    left = (len(states) - 1) * entered[0].shape[:2].numel()
    if left:
        changes = torch.bmm(_scaled(key, chunks.suffix)[:left].mT, value[:left]).view(-1, *entered.shape[1:])
        for number, change in enumerate(changes):
            chunks.next_state(number, states[number], change, states[number + 1])
    if reading.start < tile.shape[0]:
        tile[reading].baddbmm_(_scaled(query, chunks.prefix)[reading], entered.flatten(0, 2)[reading])
    return tile


@chunkwise_op.register_fake
def _allocate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    output_final_state: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, key_width = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = (rows, heads, key_width, v.shape[3]) if output_final_state else (0,)
    chunks = capacity(length, chunk_size, cu_seqlens)
    entries = (chunks, batch, heads, key_width, v.shape[3]) if save_states else (0,)
    return q.new_empty(v.shape), q.new_zeros(final, dtype=wide), q.new_empty(entries, dtype=wide)


@torch.library.custom_op("seqmix::decay_chunkwise_backward", mutates_args=())
def chunkwise_backward_op(
    d_output: Tensor,
    d_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    entries: Tensor,
    scale: float,
    chunk_size: int,
    needs_log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, d log_decay and d initial state; the last two are empty where there is nothing to differentiate."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv, d_log_decay, d_initial = _allocate_backward(
        d_output,
        d_final_state,
        q,
        k,
        v,
        log_decay,
        initial_state,
        cu_seqlens,
        entries,
        scale,
        chunk_size,
        needs_log_decay,
    )
    rows = q.shape[0] * q.shape[2]
    most = most_chunks(k, v, chunk_size)
    d_fixed = torch.zeros_like(d_log_decay, dtype=wide) if needs_log_decay and d_log_decay.ndim == 1 else None
    with torch.autocast(q.device.type, enabled=False):
        decays = _decays(log_decay, q, scale, chunk_size, q.new_empty(0, dtype=wide))
        runs = [
            (stretch, groups(stretch, chunk_size, most)) for stretch in stretches(q.shape[0], q.shape[1], cu_seqlens)
        ]
        index = sum(group.chunks for _, cuts in runs for group in cuts)
        # of the states before each chunk of a group and behind the last
        d_states = q.new_empty((most + 1, q.shape[0], *q.shape[2:], v.shape[3]), dtype=wide)
        for stretch, cuts in reversed(runs):
            # the gradient of the state behind the group; None while nothing depends on it
            d_state = None if d_final_state is None else d_final_state[stretch.rows]
            for group in reversed(cuts):
                index -= group.chunks
                # chunks that read a state which may be other than 0, and that leave one on which something depends
                blank = rows if group.start == stretch.start and initial_state is None else 0
                unread = rows if d_state is None else 0
                behind = d_states[: group.chunks + 1]
                if d_state is None:
                    behind[-1].zero_()
                else:
                    behind[-1].copy_(d_state)
                query, key, value, d_out = (operand(x, group, wide) for x in (q, k, v, d_output))
                d_query, d_key, d_value, d_a = _group_backward(
                    decays.chunks(group),
                    query,
                    key,
                    value,
                    d_out,
                    entries[index : index + group.chunks],
                    behind,
                    reading=slice(blank, None),
                    leaving=slice(0, group.chunks * rows - unread),
                    needs_log_decay=needs_log_decay,
                )
                if d_fixed is not None and d_a is not None:
                    d_fixed += d_a.view(-1, len(d_fixed)).sum(0)
                elif d_a is not None:
                    store(d_log_decay.view(*q.shape[:3], -1), group, d_a.view(*d_a.shape[:2], -1))
                for out, grad in ((dq, d_query), (dk, d_key), (dv, d_value)):
                    store(out, group, grad)
                d_state = d_states[0]
            if initial_state is not None and d_state is not None:
                d_initial[stretch.rows].copy_(d_state)
    if d_fixed is not None:
        d_log_decay.copy_(d_fixed)
    return dq, dk, dv, d_log_decay, d_initial


def _group_backward(
    chunks: _Chunk,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    d_out: Tensor,
    states: Tensor,
    d_states: Tensor,
    *,
    reading: slice,
    leaving: slice,
    needs_log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and da (if it is wanted) of a group's G chunks.

    Args:
        chunks: their decays.
        query: [G m K].
        key: [G m K].
        value: [G m V].
        d_out: [G m V].
        states: before each chunk, [n B H K V].
        d_states: gradients of these, which are written, and of the one behind the last, which is given: [n+1 B H K V].
        reading: those of G that read a state which may be other than 0, the last ones.
        leaving: those that leave a state on which something depends, the first ones.
        needs_log_decay: whether da is wanted.
    """
    total, before, after = query.shape[0], reading.start, query.shape[0] - leaving.stop
    d_exits, d_read, d_left, kept = d_states[1:], None, None, None
    if before < total:
        changes = torch.bmm(_scaled(query, chunks.prefix)[reading].mT, d_out[reading]).view(-1, *states.shape[1:])
        numbers = range(states.shape[0])[-changes.shape[0] :]
        for number, change in zip(reversed(numbers), reversed(changes.unbind()), strict=True):
            chunks.next_state(number, d_exits[number], change, d_states[number])
        d_read = torch.bmm(d_out[reading], states.flatten(0, 2)[reading].mT)
        d_read = _scaled(_among(d_read, before, 0), chunks.prefix)
    scores = chunks.scores(query, key)
    d_scores = torch.bmm(d_out, value.mT)
    d_value = torch.bmm(scores.mT, d_out)
    if after < total:
        exits = d_exits.flatten(0, 2)[leaving]
        d_left = _scaled(_among(torch.bmm(value[leaving], exits.mT), 0, after), chunks.suffix)
        d_value[leaving].baddbmm_(_scaled(key, chunks.suffix)[leaving], exits)
    if needs_log_decay and d_read is not None and d_left is not None:
        kept = (chunks.decayed(states) * d_exits).sum(4).flatten(0, 2)
    outer = _Outer(d_read, d_left, kept) if needs_log_decay else None
    d_query, d_key, d_a = chunks.scores_backward(query, key, scores, d_scores, outer)
    if d_read is not None:
        d_query += d_read
    if d_left is not None:
        d_key += d_left
    return d_query, d_key, d_value, d_a


@chunkwise_backward_op.register_fake
def _allocate_backward(
    d_output: Tensor,
    d_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    entries: Tensor,
    scale: float,
    chunk_size: int,
    needs_log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_zeros(x.shape)

    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        like(log_decay if needs_log_decay else None),
        like(initial_state),
    )


def differentiate_by(op: CustomOpDef, backward: CustomOpDef) -> None:
    """Register the gradient of a chunkwise op, of this family (by any kernel) or the delta family's.

    Its inputs are q, k, v, what else the family has, log_decay, initial_state, cu_seqlens, and the numbers that
    `chunkwise_op` takes; its results those of that.
    """

    def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.scale, ctx.chunk_size, _, _ = inputs
        # the entry states have no gradient, and zeros in its place would be as large as they are
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[2])

    def gradients(
        ctx: Any, d_output: Tensor | None, d_final_state: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *inputs, entries = ctx.saved_tensors
        v, initial_state = inputs[2], inputs[-2]
        if d_output is None:
            d_output = torch.zeros_like(v)
        if d_final_state is not None and d_final_state.numel() == 0:
            d_final_state = None
        needs_log_decay = ctx.needs_input_grad[len(inputs) - 3]
        *d_inputs, d_log_decay, d_initial = backward(
            d_output, d_final_state, *inputs, entries, ctx.scale, ctx.chunk_size, needs_log_decay
        )
        return (
            *d_inputs,
            d_log_decay if needs_log_decay else None,
            None if initial_state is None else d_initial,
            *(None,) * 5,
        )

    op.register_autograd(gradients, setup_context=save_for_backward)


differentiate_by(chunkwise_op, chunkwise_backward_op)
