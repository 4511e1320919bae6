# ruff: noqa: RET505, ARG001  a branch that is decided when a kernel is compiled needs its `else`; all take one tile
"""The Triton bodies of the decay family where every key dimension decays by itself: jitted code alone.

Notation of bodies.py; per_key_launch.py has the map of the bodies. Pairs of tokens are formed as in
ops/recurrence/intra_chunk.py: a chunk is cut into blocks of 2, of 4, .. tokens, and a pair goes by way of the middle of
the smallest block that holds it, with its query in the second half and its key in the first. The blocks of one size are
one product of the whole chunk, of which a mask leaves those pairs: but for roundings, no factor is above 1.

Clocks are those of ../tiles.py, [2 B T H K]; where inputs have 16 bits [1 B T H K], their sums alone.
"""

# Jitted functions have no types that pyright could follow.
# pyright: basic, reportArgumentType=false, reportOptionalOperand=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from ..tiles import INTERPRETED, VARYING, between, chunk_at, dot, load_tile, log2, state_at

# arguments stand in groups, which a formatter would separate: tensors, strides, sizes, constants
# fmt: off


@triton.jit(do_not_specialize=VARYING)
def key_decay(
    q, k, log_decay, queries, keys, reads, totals, clocks, table, q_row, q_token, q_head, k_row, k_token, k_head,
    scale, length, heads, shared, chunks, chunks_a_row, plane,
    K: tl.constexpr, C: tl.constexpr, TILE_INNER: tl.constexpr, TILE_OUTER: tl.constexpr,
):
    """Clocks, scale reached q, left k, total [chunks H K], and reached k to reads unless that is None; a program for
    every tile of keys, chunk and head."""
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
    """The clocks of the rows, in two parts."""
    if EXACT:
        return load_tile(clocks, token, rows, m, ks, K), load_tile(clocks + plane, token, rows, m, ks, K)
    else:
        return load_tile(clocks, token, rows, m, ks, K), 0.0


@triton.jit
def _to_middle(clocks, plane, token, whole, part, rows, m, ks, half, K: tl.constexpr, EXACT: tl.constexpr):
    """Of the blocks of two halves: the decays of queries since the middle, and of keys up to it. Rows of the other half
    have 0."""
    second, middle = (rows & half) != 0, (rows | (2 * half - 1)) - half  # the last token of the first half
    whole_0, part_0 = _clock_of(clocks, plane, token, middle, m, ks, K, EXACT)
    since = between(whole, part, whole_0, part_0, 0.0, True)
    since = tl.where(second[:, None], since, -since)
    later = tl.where(second, rows, middle)
    factor = tl.exp2(tl.where(later[:, None] < m, since, float("-inf")))
    return tl.where(second[:, None], factor, 0.0), tl.where(second[:, None], 0.0, factor)


@triton.jit
def _same_block(rows, size):
    """Which rows are in one block of so many, a power of two: [rows rows]."""
    return (rows[:, None] | (size - 1)) == (rows[None, :] | (size - 1))


@triton.jit(do_not_specialize=VARYING)
def key_pairs(
    q, k, clocks, scores, table, q_row, q_token, q_head, k_row, k_token, k_head,
    scale, length, heads, shared, chunks, chunks_a_row, plane,
    K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, TILE_INNER: tl.constexpr, TILE_OUTER: tl.constexpr,
):
    """A of one chunk and head, to scores [chunks H C C]; a program each. C is two to the power of LEVELS."""
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
    """out = x S + A z, in reverse with A^T; a program for every V tile, chunk and head. x [B T H K] has decayed."""
    tiles: tl.constexpr = (V + TILE_OUTER - 1) // TILE_OUTER
    pid = tl.program_id(0).to(tl.int64)
    tile, chunk, h = (pid % tiles).to(tl.int32), pid // tiles % chunks, pid // tiles // chunks
    row, start, m = chunk_at(chunk, table, length, chunks_a_row, C)
    if m <= 0:
        return
    m, at = m.to(tl.int32), (row * length + start) * heads + h
    rows, columns = tl.arange(0, C), tile * TILE_OUTER + tl.arange(0, TILE_OUTER)
    # in reverse the states are gradients of those that leave
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
    """To high and low is added, of every row, the sum of x over the rows of its block from its own on, or in reverse
    over those before it. Tensor cores add up two parts of 16 bits, each to its own."""
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
    """dq of the columns ks, from x = do, y = v, mine = q, other = k and S; in reverse dk, from v, do, k, q and dS'.

    No state is one of zeros; where it is strict, queries see no keys of their own. Returned is the gradient with what
    went through the decay of each token.
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
    # what goes through decays: of one size of blocks after another, each added up a turn later
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
    else:  # and of pairs of neighbours
        return gradient + low + through


@triton.jit(do_not_specialize=VARYING)
def key_backward(
    q, k, v, do, clocks, totals, states, d_states, dq, dk, d_log_decay, table,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, do_row, do_token, do_head,
    scale, length, heads, shared, chunks, chunks_a_row, plane, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, TILE_INNER: tl.constexpr, TILE_OUTER: tl.constexpr, STRICT: tl.constexpr,
):
    """dq, dk and the gradient of the log-decays; a program for every tile of keys, chunk and head.

    To a decay every term is added that went through it, and none is taken away again. Where `d_states` is None, what
    goes through the states that leave is another launch's.
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
