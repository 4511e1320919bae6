# ruff: noqa: RET505, ARG001  a branch that is decided when a kernel is compiled needs its `else`; all take one tile
"""Jitted Triton functions of the decay family with one decay per key dimension.

Notation of bodies.py; per_key_launch.py explains how the functions fit together. Pairs of tokens are decayed as in
ops/recurrence/intra_chunk.py: a chunk is divided into blocks of 2, 4, 8, .. tokens. A pair is decayed in two factors,
from the key to the middle of the smallest block that contains both, and from there to the query. The key is in the
first half of that block and the query in the second. All blocks of one size are computed by one product of the whole
chunk, and a mask selects their pairs. No factor exceeds 1, apart from rounding.

Clocks are explained in ../tiles.py: [2 B T H K] for float32 inputs; for 16-bit inputs [1 B T H K], one float32 sum.
"""

# Jitted functions have no types that pyright could follow.
# pyright: basic, reportArgumentType=false, reportOptionalOperand=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from ..tiles import INTERPRETED, VARYING, between, chunk_at, dot, load_tile, log2, state_at

# arguments are grouped as tensors, strides, sizes, constants; a formatter would undo that
# fmt: off


@triton.jit(do_not_specialize=VARYING)
def key_decay(
    q, k, log_decay, queries, keys, reads, totals, clocks, table, q_row, q_token, q_head, k_row, k_token, k_head,
    scale, length, heads, shared, chunks, chunks_a_row, plane,
    K: tl.constexpr, C: tl.constexpr, TILE_INNER: tl.constexpr, TILE_OUTER: tl.constexpr,
):
    """Compute clocks and decayed operands; one program per tile of key dimensions, chunk and head.

    `queries` receives scale reached q, `keys` left k, `totals` [chunks H K] total, and `reads` (unless None) reached k.
    """
    tiles: tl.constexpr = (K + TILE_OUTER - 1) // TILE_OUTER
    pid = tl.program_id(0).to(tl.int64)
    tile, chunk, h = (pid % tiles).to(tl.int32), pid // tiles % chunks, pid // tiles // chunks
    row, start, m = chunk_at(chunk, table, length, chunks_a_row, C)
    if m <= 0:
        return
    m = m.to(tl.int32)
    rows, ks = tl.arange(0, C), tile * TILE_OUTER + tl.arange(0, TILE_OUTER)
    inside = (rows[:, None] < m) & (ks[None, :] < K)
    at = ((row * length + start) * heads + h) * K + rows[:, None] * (heads * K) + ks[None, :]
    a = tl.load(log_decay + at, mask=inside, other=0.0)
    if q.dtype.element_ty == tl.float32:
        clock = tl.cumsum(log2(a.to(tl.float64)), 0)
        tl.store(clocks + at, tl.floor(clock).to(tl.float32), mask=inside)
        tl.store(clocks + plane.to(tl.int64) * K + at, (clock - tl.floor(clock)).to(tl.float32), mask=inside)
    else:
        clock = tl.cumsum(log2(a), 0)
        tl.store(clocks + at, clock, mask=inside)
    last = tl.sum(tl.where(rows[:, None] == m - 1, clock, 0.0), 0)
    tl.store(totals + (chunk * heads + h) * K + ks, tl.exp2(last.to(tl.float32)), mask=ks < K)
    reached = tl.exp2(clock.to(tl.float32))
    left = tl.exp2(tl.where(inside, (last[None, :] - clock).to(tl.float32), float("-inf")))
    q_tile = load_tile(q + row * q_row + start * q_token + h // shared * q_head, q_token, rows, m, ks, K)
    k_tile = load_tile(k + row * k_row + start * k_token + h // shared * k_head, k_token, rows, m, ks, K)
    tl.store(queries + at, (q_tile.to(tl.float32) * (scale * reached)).to(q_tile.dtype), mask=inside)
    tl.store(keys + at, (k_tile.to(tl.float32) * left).to(k_tile.dtype), mask=inside)
    if reads is not None:
        tl.store(reads + at, (k_tile.to(tl.float32) * reached).to(k_tile.dtype), mask=inside)


# ---- pairs


@triton.jit
def _clock_of(clocks, plane, token, rows, m, ks, K: tl.constexpr, EXACT: tl.constexpr):
    """Load the clocks of the rows as (whole, part); without EXACT, one sum and 0."""
    if EXACT:
        return load_tile(clocks, token, rows, m, ks, K), load_tile(clocks + plane, token, rows, m, ks, K)
    else:
        return load_tile(clocks, token, rows, m, ks, K), 0.0


@triton.jit
def _to_middle(clocks, plane, token, whole, part, rows, m, ks, half, K: tl.constexpr, EXACT: tl.constexpr):
    """Return decays relative to the middle of each block of two halves.

    The first result is the decay from the middle to each query in a second half, the second the decay from each key in
    a first half to the middle. Rows of the other half are 0.
    """
    second, middle = (rows & half) != 0, (rows | (2 * half - 1)) - half  # the last token of the first half
    whole_0, part_0 = _clock_of(clocks, plane, token, middle, m, ks, K, EXACT)
    since = between(whole, part, whole_0, part_0, 0.0, True)
    since = tl.where(second[:, None], since, -since)
    later = tl.where(second, rows, middle)
    factor = tl.exp2(tl.where(later[:, None] < m, since, float("-inf")))
    return tl.where(second[:, None], factor, 0.0), tl.where(second[:, None], 0.0, factor)


@triton.jit
def _same_block(rows, size):
    """Return True where two rows are in the same block of `size` tokens, a power of two: [rows rows]."""
    return (rows[:, None] | (size - 1)) == (rows[None, :] | (size - 1))


@triton.jit(do_not_specialize=VARYING)
def key_pairs(
    q, k, clocks, scores, table, q_row, q_token, q_head, k_row, k_token, k_head,
    scale, length, heads, shared, chunks, chunks_a_row, plane,
    K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, TILE_INNER: tl.constexpr, TILE_OUTER: tl.constexpr,
):
    """Compute A, to scores [chunks H C C]; one program per chunk and head. C is two to the power of LEVELS."""
    exact: tl.constexpr = q.dtype.element_ty == tl.float32
    pid = tl.program_id(0).to(tl.int64)
    h, chunk = pid // chunks, pid % chunks
    row, start, m = chunk_at(chunk, table, length, chunks_a_row, C)
    if m <= 0:
        return
    m, plane, token = m.to(tl.int32), plane.to(tl.int64) * K, heads * K
    rows = tl.arange(0, C)
    q += row * q_row + start * q_token + h // shared * q_head
    k += row * k_row + start * k_token + h // shared * k_head
    clocks += ((row * length + start) * heads + h) * K
    found, own = tl.zeros((C, C), tl.float32), tl.zeros((C,), tl.float32)
    for i in range(0, K, TILE_OUTER):
        ks = i + tl.arange(0, TILE_OUTER)
        q_tile, k_tile = load_tile(q, q_token, rows, m, ks, K), load_tile(k, k_token, rows, m, ks, K)
        wide_q, wide_k = q_tile.to(tl.float32), k_tile.to(tl.float32)
        own += tl.sum(wide_q * wide_k, 1)
        whole, part = _clock_of(clocks, plane, token, rows, m, ks, K, exact)
        for level in range(LEVELS):
            half = 1 << level
            reached, left = _to_middle(clocks, plane, token, whole, part, rows, m, ks, half, K, exact)
            query, key = (wide_q * reached).to(q_tile.dtype), (wide_k * left).to(k_tile.dtype)
            product = dot(query, tl.trans(key), tl.zeros((C, C), tl.float32))
            seen = _same_block(rows, 2 * half) & ((rows[:, None] & half) > (rows[None, :] & half))
            found += tl.where(seen, product, 0.0)
    found = scale * tl.where(rows[:, None] == rows[None, :], own[:, None], found)
    place = (chunk * heads + h) * C * C + rows[:, None] * C + rows[None, :]
    tl.store(scores + place, found.to(scores.dtype.element_ty))


# ---- outputs and gradients


@triton.jit(do_not_specialize=VARYING)
def key_band(
    x, z, scores, states, out, table, z_row, z_token, z_head, length, heads, chunks, chunks_a_row,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TILE_INNER: tl.constexpr, TILE_OUTER: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Compute out = x S + A z, in reverse with A^T; one program per V tile, chunk and head.

    x [B T H K] already includes its decay.
    """
    tiles: tl.constexpr = (V + TILE_OUTER - 1) // TILE_OUTER
    pid = tl.program_id(0).to(tl.int64)
    tile, chunk, h = (pid % tiles).to(tl.int32), pid // tiles % chunks, pid // tiles // chunks
    row, start, m = chunk_at(chunk, table, length, chunks_a_row, C)
    if m <= 0:
        return
    m, at = m.to(tl.int32), (row * length + start) * heads + h
    rows, columns = tl.arange(0, C), tile * TILE_OUTER + tl.arange(0, TILE_OUTER)
    # in reverse, states are the gradients of the states that leave chunks
    states += (state_at(chunk, table, REVERSE) * heads + h) * K * V
    weights = tl.load(scores + (chunk * heads + h) * C * C + rows[:, None] * C + rows[None, :])
    if REVERSE:
        weights = tl.trans(weights)
    z_tile = load_tile(z + row * z_row + start * z_token + h * z_head, z_token, rows, m, columns, V)
    acc = dot(weights, z_tile, tl.zeros((C, TILE_OUTER), tl.float32))
    for i in range(0, K, TILE_INNER):
        inner = i + tl.arange(0, TILE_INNER)
        state = load_tile(states, V, inner, K, columns, V)
        acc = dot(load_tile(x + at * K, heads * K, rows, m, inner, K), state, acc)
    inside = (rows[:, None] < m) & (columns[None, :] < V)
    place = at * V + rows[:, None] * (heads * V) + columns[None, :]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _through(same, rows, x, high, low, EXACT: tl.constexpr, REVERSE: tl.constexpr):
    """Add to each row of (high, low) a sum of rows of x in its block: from this row on; in reverse, those before it.

    For tensor cores, x is split into two bfloat16 parts, one of which is summed into high and one into low.
    """
    weights = same & (rows[None, :] < rows[:, None] if REVERSE else rows[None, :] >= rows[:, None])
    if EXACT or INTERPRETED:
        return dot(weights.to(tl.float32), x, high), low
    else:
        first, weights = x.to(tl.bfloat16), weights.to(tl.bfloat16)
        return dot(weights, first, high), dot(weights, (x - first.to(tl.float32)).to(tl.bfloat16), low)


@triton.jit
def _side(
    x, x_token, y, y_token, mine, mine_token, other, other_token, state, clocks, plane, token, out, gradient, m,
    scale, ks, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, TILE_INNER: tl.constexpr,
    TILE_OUTER: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr,
):
    """Compute dq of the columns ks from x = do, y = v, mine = q, other = k and S; in reverse dk from v, do, k, q, dS'.

    A state of None is zero. STRICT excludes a token's own key. Returns `gradient` plus the gradient of each token's
    log-decay through these terms.
    """
    exact: tl.constexpr = x.dtype.element_ty == tl.float32
    rows = tl.arange(0, C)
    acc, d_scores = tl.zeros((C, TILE_OUTER), tl.float32), tl.zeros((C, C), tl.float32)
    for i in range(0, V, TILE_INNER):
        inner = i + tl.arange(0, TILE_INNER)
        x_tile = load_tile(x, x_token, rows, m, inner, V)
        if state is not None:
            inside = (inner[:, None] < V) & (ks[None, :] < K)
            acc = dot(x_tile, tl.load(state + inner[:, None] + ks[None, :] * V, mask=inside, other=0.0), acc)
        d_scores = dot(x_tile, tl.trans(load_tile(y, y_token, rows, m, inner, V)), d_scores)
    whole, part = _clock_of(clocks, plane, token, rows, m, ks, K, exact)
    if REVERSE:
        whole_m, part_m = _clock_of(clocks, plane, token, rows * 0 + m - 1, m, ks, K, exact)
        left = between(whole_m, part_m, whole, part, 0.0, True)
        acc *= tl.exp2(tl.where(rows[:, None] < m, left, float("-inf")))
    else:
        acc *= scale * tl.exp2(between(whole, part, 0.0, 0.0, 0.0, True))
    my_tile = load_tile(mine, mine_token, rows, m, ks, K).to(tl.float32)
    other_tile = load_tile(other, other_token, rows, m, ks, K)
    wide = other_tile.to(tl.float32)
    # gradients through decays, one block size after another; each is summed in the next iteration
    through, low = my_tile * acc, tl.zeros((C, TILE_OUTER), tl.float32)
    d_scores *= scale
    if not STRICT:
        acc += tl.sum(tl.where(rows[:, None] == rows[None, :], d_scores, 0.0), 1)[:, None] * wide
    narrow = d_scores.to(other_tile.dtype)
    for level in range(LEVELS):
        half = C >> (level + 1)
        same = _same_block(rows, 2 * half)
        gradient, low = _through(same, rows, through, gradient, low, exact, REVERSE)
        here, there = _to_middle(clocks, plane, token, whole, part, rows, m, ks, half, K, exact)
        if REVERSE:
            here, there = there, here
        seen = (wide * there).to(other_tile.dtype)
        found = here * dot(tl.where(same, narrow, 0.0), seen, tl.zeros((C, TILE_OUTER), tl.float32))
        acc += found
        through = my_tile * found
    inside = (rows[:, None] < m) & (ks[None, :] < K)
    tl.store(out + rows[:, None] * token + ks[None, :], acc.to(out.dtype.element_ty), mask=inside)
    if REVERSE:
        return gradient + low
    else:  # the last block size, pairs of neighbours
        return gradient + low + through


@triton.jit(do_not_specialize=VARYING)
def key_backward(
    q, k, v, do, clocks, totals, states, d_states, dq, dk, d_log_decay, table,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, do_row, do_token, do_head,
    scale, length, heads, shared, chunks, chunks_a_row, plane, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, TILE_INNER: tl.constexpr, TILE_OUTER: tl.constexpr, STRICT: tl.constexpr,
):
    """Compute dq, dk and the gradient of the log-decays; one program per tile of key dimensions, chunk and head.

    The gradient of a decay is the sum of all terms that it scales; nothing is subtracted. If `d_states` is None, the
    gradient through the states that leave chunks is computed by another launch.
    """
    tiles: tl.constexpr = (K + TILE_OUTER - 1) // TILE_OUTER
    pid = tl.program_id(0).to(tl.int64)
    tile, chunk, h = (pid % tiles).to(tl.int32), pid // tiles % chunks, pid // tiles // chunks
    row, start, m = chunk_at(chunk, table, length, chunks_a_row, C)
    if m <= 0:
        return
    m, plane, token = m.to(tl.int32), plane.to(tl.int64) * K, heads * K
    rows, ks = tl.arange(0, C), tile * TILE_OUTER + tl.arange(0, TILE_OUTER)
    q += row * q_row + start * q_token + h // shared * q_head
    k += row * k_row + start * k_token + h // shared * k_head
    v += row * v_row + start * v_token + h * v_head
    do += row * do_row + start * do_token + h * do_head
    at = ((row * length + start) * heads + h) * K
    clocks += at
    states += (state_at(chunk, table, False) * heads + h) * K * V
    gradient = tl.zeros((C, TILE_OUTER), tl.float32)
    if d_states is not None:
        d_states += (state_at(chunk, table, True) * heads + h) * K * V
        kept = tl.zeros((TILE_OUTER,), tl.float32)
        for i in range(0, V, TILE_INNER):
            inner = i + tl.arange(0, TILE_INNER)
            entry = load_tile(states, V, ks, K, inner, V).to(tl.float32)
            kept += tl.sum(entry * load_tile(d_states, V, ks, K, inner, V).to(tl.float32), 1)
        kept *= tl.load(totals + (chunk * heads + h) * K + ks, mask=ks < K, other=0.0)
        gradient += kept[None, :]
    gradient = _side(
        do, do_token, v, v_token, q, q_token, k, k_token, states, clocks, plane, token, dq + at, gradient, m,
        scale, ks, K, V, C, LEVELS, TILE_INNER, TILE_OUTER, False, STRICT,
    )
    gradient = _side(
        v, v_token, do, do_token, k, k_token, q, q_token, d_states, clocks, plane, token, dk + at, gradient, m,
        scale, ks, K, V, C, LEVELS, TILE_INNER, TILE_OUTER, True, STRICT,
    )
    inside = (rows[:, None] < m) & (ks[None, :] < K)
    tl.store(d_log_decay + at + rows[:, None] * token + ks[None, :], gradient, mask=inside)
