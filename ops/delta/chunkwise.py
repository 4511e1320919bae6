"""The delta family's chunkwise op, with its own backward.

What a token writes is the error of the prediction at its key, and the predictions inside a chunk depend on each other:
a triangular system (the chunkwise form of arXiv 2406.06484, by WY representation and UT transform; with the decays of
arXiv 2412.06464). Per chunk of m tokens with entry state S and exit state S' (notation of delta.py; p, s, g, D of the
decays as in decay_chunkwise.py; b multiplies rows):

    A = scale (q k^T) * D        L = (k k^T) * D, below the diagonal
    E = v - L U - (k * p) S      U = b E, so  U = T b (v - (k * p) S)  with  T = (1 + b L)^-1
    o = A U + scale (q * p) S    S' = g * S + (k * s)^T U

Queries and keys read alike: with X = [q; k], Y = [o; E] and M = [scale D; -D below the diagonal], r = [scale p; -p],

    P = (X k^T) * M = [A; -L]    Y = P U + (X * r) S + [0; v]

and backward, from dS' and do:

    dU = T^T (A^T do + (k * s) dS')          dE = b dU        dY = [do; dE]       dv = dE       db = <E, dU>_V
    dP = dY U^T                  dX = (dP * M) k + (dY S^T) * r          dk += (dP * M)^T X + (U dS'^T) * s
    dS = g * dS' + (X * r)^T dY
    da_l = sum_{j < l <= i} (dP * P)_ij + sum_{i >= l} <X, (dY S^T) * r>_i
         + sum_{j < l} <k, (U dS'^T) * s>_j + <g * S, dS'>

with i a row of queries or of keys; every term is added to the decays that it went through, and none is taken away
again. T is formed once a chunk, by a solve: products with it are several times as quick as solves are. Its entries are
as bounded as the state is: 1 on the diagonal and at most b below, where keys have norm 1 and b is up to 2.

The forward keeps the chunks' entry states only; the backward recomputes the rest, chunk by chunk. A ragged last chunk
is simply shorter. Inside a chunk batch and heads are one dimension, G = B H, as batched products want it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..chunks import Group, capacity, groups, operand, store
from ..decay.chunkwise import differentiate_by, sum_after
from ..packing import stretches


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


def _beta(beta: Tensor, chunk: Group, dtype: torch.dtype) -> Tensor:
    """A chunk's tokens of [B T H] as [G m 1]; what is multiplied with a view would be laid out as it is."""
    return operand(beta[..., None], chunk, dtype).contiguous()


@torch.library.custom_op("seqmix::delta_chunkwise", mutates_args=())
def chunkwise_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
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
        q, k, v, beta, log_decay, initial_state, cu_seqlens, scale, chunk_size, output_final_state, save_states
    )
    index = 0
    with torch.autocast(q.device.type, enabled=False):
        decays_of = _ChunkDecays(log_decay, q.shape[0], min(chunk_size, q.shape[1]), scale, q.new_empty(0, dtype=wide))
        for stretch in stretches(q.shape[0], q.shape[1], cu_seqlens):
            state = None if initial_state is None else initial_state[stretch.rows].to(wide).flatten(0, 1)
            if save_states and stretch.start < stretch.stop:
                entries[index].zero_() if state is None else entries[index].flatten(0, 1).copy_(state)
            for chunk in groups(stretch, chunk_size, 1):
                decays, rate = decays_of(chunk.start, chunk.stop), _beta(beta, chunk, wide)
                query, key, value = (operand(x, chunk, wide) for x in (q, k, v))
                reads, pairs, inverse = _system(query, key, rate, decays)
                if state is None:
                    written = torch.bmm(inverse, rate * value)
                    tile = torch.bmm(_of_queries(pairs), written)
                else:
                    outer = torch.bmm(reads, state).mul_(decays.read)
                    written = torch.bmm(inverse, rate * (value + _of_keys(outer)))
                    tile = torch.baddbmm(_of_queries(outer), _of_queries(pairs), written)
                store(output, chunk, tile)
                index += 1
                last = chunk.stop == stretch.stop
                if not last or output_final_state:
                    # the next chunk's entry state is formed in its place
                    place = entries[index].flatten(0, 1) if save_states and not last else None
                    state = _next_state(state, _times(key, decays.suffix), written, decays.total, place)
            if output_final_state and state is not None:
                final_state[stretch.rows].flatten(0, 1).copy_(state)
    if save_states:
        entries[index:].zero_()  # documents that end in one chunk leave rows over
    return output, final_state, entries


def _next_state(state: Tensor | None, key: Tensor, written: Tensor, total: Tensor | None, out: Tensor | None) -> Tensor:
    """g * S + key^T U, into `out` if given."""
    if state is None:
        return torch.bmm(key.mT, written, out=out)
    return torch.baddbmm(_times(state, total), key.mT, written, out=out)


@chunkwise_op.register_fake
def _allocate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
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


@torch.library.custom_op("seqmix::delta_chunkwise_backward", mutates_args=())
def chunkwise_backward_op(
    d_output: Tensor,
    d_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    entries: Tensor,
    scale: float,
    chunk_size: int,
    needs_log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, d beta, d log_decay and d initial state; the last two are empty where there is nothing to
    differentiate."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv, d_beta, d_log_decay, d_initial = _allocate_backward(
        d_output,
        d_final_state,
        q,
        k,
        v,
        beta,
        log_decay,
        initial_state,
        cu_seqlens,
        entries,
        scale,
        chunk_size,
        needs_log_decay,
    )
    d_fixed = q.new_zeros(q.shape[2], dtype=wide)
    with torch.autocast(q.device.type, enabled=False):
        decays_of = _ChunkDecays(log_decay, q.shape[0], min(chunk_size, q.shape[1]), scale, q.new_empty(0, dtype=wide))
        runs = [(stretch, groups(stretch, chunk_size, 1)) for stretch in stretches(q.shape[0], q.shape[1], cu_seqlens)]
        index = sum(len(cuts) for _, cuts in runs)
        for stretch, cuts in reversed(runs):
            # the gradient of the state behind the chunk; None while nothing depends on it
            d_state = None if d_final_state is None else d_final_state[stretch.rows].to(wide).flatten(0, 1)
            for chunk in reversed(cuts):
                index -= 1
                decays, rate = decays_of(chunk.start, chunk.stop), _beta(beta, chunk, wide)
                query, key, value, d_out = (operand(x, chunk, wide) for x in (q, k, v, d_output))
                entered = chunk.start > stretch.start or initial_state is not None
                state = entries[index].flatten(0, 1) if entered else None
                reads, pairs, inverse = _system(query, key, rate, decays)
                if state is not None:
                    value = torch.addcmul(value, torch.bmm(key, state), _of_keys(decays.read))
                written = torch.bmm(inverse, rate * value)
                error = torch.baddbmm(value, _of_keys(pairs), written)

                scaled_key = _times(key, decays.suffix)
                d_written = torch.bmm(_of_queries(pairs).mT, d_out)
                if d_state is not None:
                    d_written.baddbmm_(scaled_key, d_state)
                d_written = torch.bmm(inverse.mT, d_written)
                d_read = torch.cat((d_out, rate * d_written), dim=1)
                d_pairs = torch.bmm(d_read, written.mT)
                within = d_pairs * pairs if needs_log_decay else None
                d_pairs.mul_(decays.mask)
                d_reads, d_key = torch.bmm(d_pairs, key), torch.bmm(d_pairs.mT, reads)
                store(dv, chunk, _of_keys(d_read))
                store(d_beta[..., None], chunk, (error * d_written).sum(2, keepdim=True))
                d_outer = d_key_outer = None
                if state is not None:
                    d_read = d_read.mul_(decays.read)
                    d_outer = torch.bmm(d_read, state.mT)
                    d_reads += d_outer
                if d_state is not None:
                    d_key_outer = _times(torch.bmm(written, d_state.mT), decays.suffix)
                    d_key += d_key_outer
                d_key += _of_keys(d_reads)
                store(dq, chunk, _of_queries(d_reads))
                store(dk, chunk, d_key)
                if within is not None:
                    d_a = _log_decay_gradient(
                        within,
                        None if d_outer is None else torch.linalg.vecdot(reads, d_outer),
                        None if d_key_outer is None else torch.linalg.vecdot(key, d_key_outer),
                    )
                    if state is not None and d_state is not None:
                        kept = _times(state, decays.total)
                        d_a += torch.linalg.vecdot(kept.flatten(1), d_state.flatten(1))[:, None]
                    if d_log_decay.ndim == 1:
                        d_fixed += d_a.unflatten(0, (-1, q.shape[2])).sum((0, 2))
                    else:
                        store(d_log_decay, chunk, d_a)
                if entered:
                    d_state = _next_state(d_state, reads, d_read, decays.total, None)
            if initial_state is not None and d_state is not None:
                d_initial[stretch.rows].flatten(0, 1).copy_(d_state)
    if needs_log_decay and d_log_decay.ndim == 1:
        d_log_decay.copy_(d_fixed)
    return dq, dk, dv, d_beta, d_log_decay, d_initial


@chunkwise_backward_op.register_fake
def _allocate_backward(
    d_output: Tensor,
    d_final_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    entries: Tensor,
    scale: float,
    chunk_size: int,
    needs_log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_zeros(x.shape)

    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        beta.new_empty(beta.shape),
        like(log_decay if needs_log_decay else None),
        like(initial_state),
    )


def _log_decay_gradient(within: Tensor, read: Tensor | None, left: Tensor | None) -> Tensor:
    """One chunk of da, but for what the entry state left in the exit state.

    Args:
        within: dP * P, [G 2m m].
        read: what each row of X read of the entry state, [G 2m].
        left: what each key left in the exit state, [G m].

    Returns:
        [G m].
    """
    # entry [i, l] adds up what token i read of the tokens before l, the entry state first
    before = within.unflatten(1, (2, -1)).sum(1).roll(1, 2)
    before[..., 0] = 0 if read is None else read.unflatten(1, (2, -1)).sum(1)
    grad = before.cumsum(2).tril_().sum(1)
    if left is not None:
        grad[:, 1:] += left[:, :-1].cumsum(1)
    return grad


differentiate_by(chunkwise_op, chunkwise_backward_op)
