"""Jitted Triton functions of the delta rule, besides those it shares with the decay family.

Notation of ../decay/bodies.py; op.py has the recurrence and explains how the functions fit together.
"""

# Jitted functions have no types that pyright could follow.
# pyright: basic, reportArgumentType=false, reportOptionalOperand=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from ..tiles import VARYING, between, chunk_at, clock_of, dot, last_clock, load_tile, rate_of, sequence_at, state_at

# arguments are grouped as tensors, strides, sizes, constants; a formatter would undo that
# fmt: off


@triton.jit(do_not_specialize=VARYING)
def solve(
    q, k, beta, rates, clocks, pairs, inverse, weights, table, q_row, q_token, q_head, k_row, k_token, k_head,
    scale, length, heads, chunks, chunks_a_row, plane, K: tl.constexpr, C: tl.constexpr, TILE_INNER: tl.constexpr,
):
    """Compute T, to inverse [chunks H C C], and A, to weights unless that is None; one program per chunk and head.

    T = (1 + L)^-1 with L = (beta k k^T) * D below the diagonal, where D_ij is the decay from token j to token i. It is
    computed row by row: T_i = 1_i - sum_{j < i} L_ij T_j. `pairs` has (k k^T) * D, [chunks H C C]; if it is None, they
    are computed here. Both are held transposed, so that row i of L is read as a column.
    """
    pid = tl.program_id(0).to(tl.int64)
    h, chunk = pid // chunks, pid % chunks
    row, start, m = chunk_at(chunk, table, length, chunks_a_row, C)
    if m <= 0:
        return
    m = m.to(tl.int32)
    rows = tl.arange(0, C)
    q += row * q_row + start * q_token + h * q_head
    k += row * k_row + start * k_token + h * k_head
    square = (chunk * heads + h) * C * C
    place, transposed = rows[:, None] * C + rows[None, :], rows[None, :] * C + rows[:, None]
    if pairs is not None:
        system = tl.load(pairs + square + transposed)
    else:
        system, scores = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
        for i in range(0, K, TILE_INNER):
            inner = i + tl.arange(0, TILE_INNER)
            k_tile = load_tile(k, k_token, rows, m, inner, K)
            system = dot(k_tile, tl.trans(k_tile), system)
            if weights is not None:
                scores = dot(k_tile, tl.trans(load_tile(q, q_token, rows, m, inner, K)), scores)
        at, rate = (row * heads + h) * length + start, rate_of(rates, h)
        whole, part = clock_of(clocks, plane, at, rows, m)
        decay = between(whole[None, :], part[None, :], whole[:, None], part[:, None], rate, clocks is not None)
        seen = (rows[:, None] <= rows[None, :]) & (rows[None, :] < m)
        decay = tl.exp2(tl.where(seen, decay, float("-inf")))
        system *= decay
        if weights is not None:
            tl.store(weights + square + transposed, (scale * scores * decay).to(weights.dtype.element_ty))

    b = tl.load(beta + (row * length + start + rows) * heads + h, mask=rows < m, other=0.0).to(tl.float32)
    system = tl.where(rows[:, None] < rows[None, :], system * b[None, :], 0.0)
    found = tl.where(rows[:, None] == rows[None, :], 1.0, 0.0)
    for i in range(1, C):
        weight = tl.sum(tl.where(rows[None, :] == i, system, 0.0), 1)
        change = tl.sum(weight[:, None] * found, 0)
        found -= tl.where(rows[:, None] == i, change[None, :], 0.0)
    tl.store(inverse + square + place, found.to(inverse.dtype.element_ty))


@triton.jit(do_not_specialize=VARYING)
def delta_scan(
    q, k, v, beta, rates, clocks, totals, reads, inverse, weights, initial, states, written, final, entries, products,
    firsts, table, q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    scale, length, heads, chunks_a_row, plane,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, TILE_K: tl.constexpr, TILE_V: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Carry a tile of the state, all keys by TILE_V values, through all chunks of a sequence.

    One program per tile of values, sequence and head. Forward: U = T beta (v - reached (k S)) to `written`, and
    S' = total S + k^T (left U); `states` receives S of every chunk. In reverse, v is do: z = T^T (A^T do + left
    (k dS')) to `written`, and dS = total dS' + q^T (scale reached do) - k^T (beta reached z); `states` receives dS' of
    every chunk, and `products` <S, dS'> if `entries` has the states S.

    With decays per key dimension, q and k already include their decays, `reads` is reached k, and `totals` [chunks H K]
    is total.
    """
    tiles: tl.constexpr = (V + TILE_V - 1) // TILE_V
    pid = tl.program_id(0).to(tl.int64)
    tile, sequence = (pid % tiles).to(tl.int32), pid // tiles
    n, h = sequence // heads, sequence % heads
    ks = tl.arange(0, TILE_K)
    vs = tile * TILE_V + tl.arange(0, TILE_V)
    inside = (ks[:, None] < K) & (vs[None, :] < V)
    place = ks[:, None] * V + vs[None, :]
    rows = tl.arange(0, C)
    square = rows[:, None] * C + rows[None, :]
    rate = rate_of(rates, h)
    row, first, count = sequence_at(n, firsts, length, chunks_a_row, C)
    q += row * q_row + h * q_head
    k += row * k_row + h * k_head
    v += row * v_row + h * v_head
    if reads is not None:  # reads has the strides of k
        reads += row * k_row + h * k_head

    if initial is None:
        acc = tl.zeros((TILE_K, TILE_V), tl.float32)
    else:
        acc = tl.load(initial + sequence * K * V + place, mask=inside, other=0.0)
    for step in range(count):
        number = step
        if REVERSE:
            number = count - 1 - step
        index = (first + number).to(tl.int64)
        chunk = index * heads + h
        entry = acc.to(states.dtype.element_ty)
        if entries is not None:
            state = (state_at(index, table, False) * heads + h) * K * V
            other = tl.load(entries + state + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(products + chunk * tiles + tile, tl.sum(other * acc))
        state = (state_at(index, table, REVERSE) * heads + h) * K * V
        tl.store(states + state + place, entry, mask=inside)
        # loaded from the table: computing them from the document's boundary takes more registers
        row, start, m = chunk_at(index, table, length, chunks_a_row, C)
        m = m.to(tl.int32)
        at, token = (row * heads + h) * length + start, (row * length + start) * heads + h
        whole, part = clock_of(clocks, plane, at, rows, m)
        whole_m, part_m = last_clock(clocks, plane, at, m)
        reached = tl.exp2(between(whole, part, 0.0, 0.0, rate, clocks is not None))
        left = between(whole_m, part_m, whole, part, rate, clocks is not None)
        left = tl.exp2(tl.where(rows < m, left, float("-inf")))
        b = tl.load(beta + token + rows * heads, mask=rows < m, other=0.0).to(tl.float32)
        k_tile = load_tile(k + start * k_token, k_token, rows, m, ks, K)
        reader = k_tile
        if reads is not None:
            reader = load_tile(reads + start * k_token, k_token, rows, m, ks, K)
        v_tile = load_tile(v + start * v_token, v_token, rows, m, vs, V)
        solved = tl.load(inverse + chunk * C * C + square)
        acc *= tl.exp2(between(whole_m, part_m, 0.0, 0.0, rate, clocks is not None))
        if totals is not None:
            acc *= tl.load(totals + chunk * K + ks, mask=ks < K, other=0.0)[:, None]
        if REVERSE:
            read = left[:, None] * dot(k_tile, entry, tl.zeros((C, TILE_V), tl.float32))
            read = dot(tl.trans(tl.load(weights + chunk * C * C + square)), v_tile, read)
            own = dot(tl.trans(solved), read.to(v_tile.dtype), tl.zeros((C, TILE_V), tl.float32))
            q_tile = load_tile(q + start * q_token, q_token, rows, m, ks, K)
            acc = dot(tl.trans(q_tile), ((scale * reached)[:, None] * v_tile.to(tl.float32)).to(v_tile.dtype), acc)
            acc = dot(tl.trans(reader), (-(b * reached)[:, None] * own).to(v_tile.dtype), acc)
        else:
            read = dot(reader, entry, tl.zeros((C, TILE_V), tl.float32))
            read = b[:, None] * (v_tile.to(tl.float32) - reached[:, None] * read)
            own = dot(solved, read.to(v_tile.dtype), tl.zeros((C, TILE_V), tl.float32))
            acc = dot(tl.trans(k_tile), (left[:, None] * own).to(v_tile.dtype), acc)
        within = (rows[:, None] < m) & (vs[None, :] < V)
        tl.store(written + token * V + rows[:, None] * (heads * V) + vs[None, :], own.to(v_tile.dtype), mask=within)
    if final is not None:
        tl.store(final + sequence * K * V + place, acc, mask=inside)
