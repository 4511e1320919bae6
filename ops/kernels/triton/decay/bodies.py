"""Jitted Triton functions of the decay family.

Notation of ops/decay/api.py and chunkwise.py: a chunk has m <= C tokens, counted from 0 by i and j. S is the state that
enters the chunk, dS' the gradient of the state that leaves it. op.py explains how the functions fit together, launch.py
has their configurations. Clocks are explained in ../tiles.py. In equations,

    reached_i = exp2(clock_i)                  decay from the start of the chunk up to token i
    left_j    = exp2(clock_{m-1} - clock_j)    decay from token j to the end of the chunk
    total     = exp2(clock_{m-1})              decay over the whole chunk
    A_ij      = scale exp2(clock_i - clock_j) q_i k_j^T        for j <= i, else 0

exp2 never has an argument above 0: masked arguments are set to -inf first. `shared` heads have a query and key in
common.
"""

# Jitted functions have no types that pyright could follow.
# pyright: basic, reportArgumentType=false, reportOptionalOperand=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from ..tiles import (
    VARYING,
    between,
    chunk_at,
    clock_of,
    dot,
    last_clock,
    load_tile,
    log2,
    rate_of,
    sequence_at,
    state_at,
)

# arguments are grouped as tensors, strides, sizes, constants; a formatter would undo that
# fmt: off

# Tile counts are written out, because tl.cdiv of constants is not a constant in Triton 3.6.

# ---- clocks of decays per token


@triton.jit(do_not_specialize=VARYING)
def clocks(log_decay, clocks, table, length, heads, chunks, chunks_a_row, plane, C: tl.constexpr):
    """Compute clocks [2 B H T] (whole and part) from log_decay [B T H]; one program per chunk and head."""
    pid = tl.program_id(0).to(tl.int64)
    h, chunk = pid // chunks, pid % chunks
    row, start, m = chunk_at(chunk, table, length, chunks_a_row, C)
    rows = tl.arange(0, C)
    a = tl.load(log_decay + (row * length + start + rows) * heads + h, mask=rows < m, other=0.0)
    # float64 for these few numbers: a clock must stay exact after resets added multiples of 256 to it
    clock = tl.cumsum(log2(a.to(tl.float64)), 0)
    whole = tl.floor(clock)
    at = clocks + (row * heads + h) * length + start + rows
    tl.store(at, whole.to(tl.float32), mask=rows < m)
    tl.store(at + plane, (clock - whole).to(tl.float32), mask=rows < m)


# ---- from chunk to chunk


@triton.jit(do_not_specialize=VARYING)
def state_scan(
    x, w, rates, clocks, totals, initial, states, final, entries, products, boundaries, firsts, table,
    x_row, x_token, x_head, w_row, w_token, w_head,
    scale, length, heads, shared, chunks_a_row, plane,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, TILE_K: tl.constexpr,
    TILE_V: tl.constexpr, REVERSE: tl.constexpr,
):
    """Carry a tile of the state through all chunks of a sequence; one program per state tile, sequence and head.

    Forward: S' = total S + (left x)^T w with x = k, w = v; `states` receives S of every chunk. Reverse: dS = total dS'
    + (scale reached x)^T w with x = q, w = do; `states` receives dS' of every chunk. In reverse, `products` receives
    <S, dS'> of every chunk if `entries` has the states S. `shared` heads have one x.
    """
    across: tl.constexpr = (V + TILE_V - 1) // TILE_V
    tiles: tl.constexpr = (K + TILE_K - 1) // TILE_K * across
    pid = tl.program_id(0).to(tl.int64)
    tile, sequence = (pid % tiles).to(tl.int32), pid // tiles
    n, h = sequence // heads, sequence % heads
    ks = tile // across * TILE_K + tl.arange(0, TILE_K)
    vs = tile % across * TILE_V + tl.arange(0, TILE_V)
    inside = (ks[:, None] < K) & (vs[None, :] < V)
    place = ks[:, None] * V + vs[None, :]
    rows = tl.arange(0, C)
    rate = rate_of(rates, h)

    row, first, count = sequence_at(n, firsts, length, chunks_a_row, C)
    x_at, w_at = x + row * x_row + h // shared * x_head, w + row * w_row + h * w_head
    clock_at, size = (row * heads + h) * length, length
    if boundaries is not None:
        begin = tl.load(boundaries + n).to(tl.int64)
        size = (tl.load(boundaries + n + 1) - begin).to(tl.int32)
        x_at, w_at, clock_at = x_at + begin * x_token, w_at + begin * w_token, clock_at + begin

    if initial is None:
        acc = tl.zeros((TILE_K, TILE_V), tl.float32)
    else:
        acc = tl.load(initial + sequence * K * V + place, mask=inside, other=0.0)
    for step in range(count):
        number = step
        if REVERSE:
            number = count - 1 - step
        index = (first + number).to(tl.int64)
        state = (state_at(index, table, REVERSE) * heads + h) * K * V
        tl.store(states + state + place, acc.to(states.dtype.element_ty), mask=inside)
        if entries is not None:
            state = (state_at(index, table, False) * heads + h) * K * V
            entry = tl.load(entries + state + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(products + (index * heads + h) * tiles + tile, tl.sum(entry * acc))
        # computed, not loaded from the table: loads whose address is itself loaded are not pipelined
        start, m = (number * C).to(tl.int64), tl.minimum(size - number * C, C)
        x_tile = tl.trans(load_tile(x_at + start * x_token, x_token, rows, m, ks, K))
        w_tile = load_tile(w_at + start * w_token, w_token, rows, m, vs, V)
        if rates is None and clocks is None:
            if REVERSE:
                x_tile = (x_tile.to(tl.float32) * scale).to(x_tile.dtype)
        else:
            at = clock_at + start
            whole, part = clock_of(clocks, plane, at, rows, m)
            whole_m, part_m = last_clock(clocks, plane, at, m)
            if REVERSE:
                factor = scale * tl.exp2(between(whole, part, 0.0, 0.0, rate, clocks is not None))
            else:
                left = between(whole_m, part_m, whole, part, rate, clocks is not None)
                factor = tl.exp2(tl.where(rows < m, left, float("-inf")))
            x_tile = (x_tile.to(tl.float32) * factor[None, :]).to(x_tile.dtype)
            acc *= tl.exp2(between(whole_m, part_m, 0.0, 0.0, rate, clocks is not None))
        if totals is not None:  # [chunks H K], one per key dimension; x already includes its decay
            acc *= tl.load(totals + (index * heads + h) * K + ks, mask=ks < K, other=0.0)[:, None]
        acc = dot(x_tile, w_tile, acc, PRECISION)
    if final is not None:
        tl.store(final + sequence * K * V + place, acc, mask=inside)


# ---- inside a chunk


@triton.jit
def _band(
    x, x_token, y, y_token, z, z_token, state, out, out_token, other, other_token, sums, rates, clocks, plane,
    at, h, m, scale, outer,
    INNER: tl.constexpr, OUTER: tl.constexpr, STATE_INNER: tl.constexpr, STATE_OUTER: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr, TILE_INNER: tl.constexpr, TILE_OUTER: tl.constexpr, REVERSE: tl.constexpr,
    STRICT: tl.constexpr = False,
):
    """Compute out = factor (x state) + (mask * (x y^T)) z for the columns from `outer` on.

    x and y are [m INNER], z is [m OUTER]. Forward, rows are queries, which see keys up to their own token. In reverse,
    rows are keys, seen by queries from their own token on. STRICT excludes a token's own key. A state of None is zero.
    The reversed scores are computed as a product, not as a transpose, because some versions of Triton miscompile the
    transpose of a product. `sums` receives the dot products of the rows of `other` with those of the first term.
    """
    rows = tl.arange(0, C)
    columns = outer + tl.arange(0, TILE_OUTER)
    acc = tl.zeros((C, TILE_OUTER), tl.float32)
    scores = tl.zeros((C, C), tl.float32)
    for i in range(0, INNER, TILE_INNER):
        inner = i + tl.arange(0, TILE_INNER)
        x_tile = load_tile(x, x_token, rows, m, inner, INNER)
        if state is not None:
            inside = (inner[:, None] < INNER) & (columns[None, :] < OUTER)
            place = inner[:, None] * STATE_INNER + columns[None, :] * STATE_OUTER
            acc = dot(x_tile, tl.load(state + place, mask=inside, other=0.0), acc, PRECISION)
        scores = dot(x_tile, tl.trans(load_tile(y, y_token, rows, m, inner, INNER)), scores, PRECISION)

    if REVERSE:
        seen = (rows[:, None] <= rows[None, :]) & (rows[None, :] < m)
    else:
        seen = (rows[:, None] >= rows[None, :]) & (rows[:, None] < m)
    if STRICT:
        seen &= rows[:, None] != rows[None, :]
    if rates is None and clocks is None:
        scores = tl.where(seen, scores * scale, 0.0)
        if not REVERSE:
            acc *= scale
    else:
        rate = rate_of(rates, h)
        whole, part = clock_of(clocks, plane, at, rows, m)
        if REVERSE:
            whole_m, part_m = last_clock(clocks, plane, at, m)
            left = between(whole_m, part_m, whole, part, rate, clocks is not None)
            factor = tl.exp2(tl.where(rows < m, left, float("-inf")))
            pair = between(whole[None, :], part[None, :], whole[:, None], part[:, None], rate, clocks is not None)
        else:
            factor = scale * tl.exp2(between(whole, part, 0.0, 0.0, rate, clocks is not None))
            pair = between(whole[:, None], part[:, None], whole[None, :], part[None, :], rate, clocks is not None)
        acc *= factor[:, None]
        scores *= scale * tl.exp2(tl.where(seen, pair, float("-inf")))

    z_tile = load_tile(z, z_token, rows, m, columns, OUTER)
    if sums is not None:
        other_tile = load_tile(other, other_token, rows, m, columns, OUTER).to(tl.float32)
        tl.store(sums + rows, tl.sum(other_tile * acc, 1), mask=rows < m)
    acc = dot(scores.to(z_tile.dtype), z_tile, acc, PRECISION)
    inside = (rows[:, None] < m) & (columns[None, :] < OUTER)
    tl.store(out + rows[:, None] * out_token + columns[None, :], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def band_forward(
    q, k, v, rates, clocks, states, out, table,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    scale, length, heads, shared, chunks, chunks_a_row, plane,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, TILE_INNER: tl.constexpr,
    TILE_OUTER: tl.constexpr,
):
    """Compute o = scale (reached q) S + A v; one program per V tile, chunk and head."""
    tiles: tl.constexpr = (V + TILE_OUTER - 1) // TILE_OUTER
    pid = tl.program_id(0).to(tl.int64)
    tile, chunk, h = (pid % tiles).to(tl.int32), pid // tiles % chunks, pid // tiles // chunks
    row, start, m = chunk_at(chunk, table, length, chunks_a_row, C)
    if m <= 0:
        return
    state = (state_at(chunk, table, False) * heads + h) * K * V
    _band(
        q + row * q_row + start * q_token + h // shared * q_head, q_token,
        k + row * k_row + start * k_token + h // shared * k_head, k_token,
        v + row * v_row + start * v_token + h * v_head, v_token, states + state,
        out + ((row * length + start) * heads + h) * V, heads * V, None, 0, None, rates, clocks, plane,
        (row * heads + h) * length + start, h, m.to(tl.int32), scale, tile * TILE_OUTER, K, V, V, 1, C, PRECISION,
        TILE_INNER, TILE_OUTER, False,
    )


@triton.jit(do_not_specialize=VARYING)
def band_backward(
    q, k, v, do, rates, clocks, states, d_states, dq, dk, dv, sums, table,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, do_row, do_token, do_head,
    scale, length, heads, shared, chunks, chunks_a_row, plane,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, TILE_INNER: tl.constexpr,
    TILE_OUTER: tl.constexpr, STRICT: tl.constexpr,
):
    """Compute dq, dk and (unless it is None) dv; one program per role, tile, chunk and head.

    The role is which gradient to compute. Roles of a chunk are neighbours, so that they run at the same time and read
    the chunk from memory once. `sums` [2 tiles B H T] receives the rows' q dq and k dk, of gradients through states.
    """
    k_tiles: tl.constexpr = (K + TILE_OUTER - 1) // TILE_OUTER
    v_tiles: tl.constexpr = (V + TILE_OUTER - 1) // TILE_OUTER
    roles: tl.constexpr = 2 * k_tiles + (0 if dv is None else v_tiles)
    pid = tl.program_id(0).to(tl.int64)
    role, chunk, h = (pid % roles).to(tl.int32), pid // roles % chunks, pid // roles // chunks
    row, start, m = chunk_at(chunk, table, length, chunks_a_row, C)
    if m <= 0:
        return
    m, plane = m.to(tl.int32), plane.to(tl.int64)
    q += row * q_row + start * q_token + h // shared * q_head
    k += row * k_row + start * k_token + h // shared * k_head
    v += row * v_row + start * v_token + h * v_head
    do += row * do_row + start * do_token + h * do_head
    at = (row * heads + h) * length + start
    token = (row * length + start) * heads + h
    if role < k_tiles:
        states += (state_at(chunk, table, False) * heads + h) * K * V
        if sums is not None:
            sums += role * plane + at
        _band(
            do, do_token, v, v_token, k, k_token, states, dq + token * K, heads * K, q, q_token, sums, rates,
            clocks, plane, at, h, m, scale, role * TILE_OUTER, V, K, 1, V, C, PRECISION, TILE_INNER, TILE_OUTER, False,
            STRICT,
        )
    elif role < 2 * k_tiles:
        if d_states is not None:
            d_states += (state_at(chunk, table, True) * heads + h) * K * V
        if sums is not None:
            sums += role * plane + at
        _band(
            v, v_token, do, do_token, q, q_token, d_states, dk + token * K, heads * K, k, k_token, sums,
            rates, clocks, plane, at, h, m, scale, (role - k_tiles) * TILE_OUTER, V, K, 1, V, C, PRECISION, TILE_INNER,
            TILE_OUTER, True, STRICT,
        )
    elif dv is not None:
        d_states += (state_at(chunk, table, True) * heads + h) * K * V
        _band(
            k, k_token, q, q_token, do, do_token, d_states, dv + token * V, heads * V, None, 0, None, rates,
            clocks, plane, at, h, m, scale, (role - 2 * k_tiles) * TILE_OUTER, K, V, V, 1, C, PRECISION, TILE_INNER,
            TILE_OUTER, True, STRICT,
        )


# ---- gradient of log-decays


@triton.jit
def _sum_of_tiles(x, size, rows, inside, TILES: tl.constexpr, C: tl.constexpr):
    """Sum x [TILES size] over its tiles, at the given rows: [rows]."""
    total = tl.zeros((C,), tl.float32)
    for tile in range(TILES):
        total += tl.load(x + tile * size + rows, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=VARYING)
def decay_gradient(
    q, k, v, do, rates, clocks, sums, products, out, table,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head, do_row, do_token, do_head,
    scale, length, heads, shared, chunks, chunks_a_row, plane,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr, TILE_INNER: tl.constexpr,
    TILES: tl.constexpr, PRODUCTS: tl.constexpr,
):
    """Compute the gradient of log-decays; one program per chunk and head.

    With P = A * (do v^T), and dq and dk the parts of the gradients that come through states:

        per token   da_l = sum_{j < l <= i} P_ij + sum_{i >= l} q_i dq_i + sum_{j < l} k_j dk_j + total <S, dS'>
        per head    the sum of da_l, in which a term counts once for every token that it decays over:
                    sum (i - j) P_ij + sum (i + 1) q_i dq_i + sum (m - 1 - j) k_j dk_j + m total <S, dS'>

    `out` is [B T H] for decays per token, or [chunks H] for decays per head. No large terms cancel, so gradients that
    are small because of strong decays keep their relative precision. Terms across a reset are 0.
    """
    pid = tl.program_id(0).to(tl.int64)
    h, chunk = pid // chunks, pid % chunks
    row, start, m = chunk_at(chunk, table, length, chunks_a_row, C)
    if m <= 0:
        return
    m, plane = m.to(tl.int32), plane.to(tl.int64)
    rows = tl.arange(0, C)
    q += row * q_row + start * q_token + h // shared * q_head
    k += row * k_row + start * k_token + h // shared * k_head
    v += row * v_row + start * v_token + h * v_head
    do += row * do_row + start * do_token + h * do_head
    scores = tl.zeros((C, C), tl.float32)
    for i in range(0, K, TILE_INNER):
        inner = i + tl.arange(0, TILE_INNER)
        q_tile = load_tile(q, q_token, rows, m, inner, K)
        scores = dot(q_tile, tl.trans(load_tile(k, k_token, rows, m, inner, K)), scores, PRECISION)
    d_scores = tl.zeros((C, C), tl.float32)
    for i in range(0, V, TILE_INNER):
        inner = i + tl.arange(0, TILE_INNER)
        do_tile = load_tile(do, do_token, rows, m, inner, V)
        d_scores = dot(do_tile, tl.trans(load_tile(v, v_token, rows, m, inner, V)), d_scores, PRECISION)
    at = (row * heads + h) * length + start
    rate = rate_of(rates, h)
    whole, part = clock_of(clocks, plane, at, rows, m)
    pair = between(whole[:, None], part[:, None], whole[None, :], part[None, :], rate, clocks is not None)
    seen = (rows[:, None] >= rows[None, :]) & (rows[:, None] < m)
    pairs = scores * d_scores * (scale * tl.exp2(tl.where(seen, pair, float("-inf"))))

    through_q = _sum_of_tiles(sums + at, plane, rows, rows < m, TILES, C)
    kept = 0.0
    if PRODUCTS:  # Triton would compile the load even in a loop of 0 iterations
        for tile in range(PRODUCTS):
            kept += tl.load(products + (chunk * heads + h) * PRODUCTS + tile)
    whole_m, part_m = last_clock(clocks, plane, at, m)
    kept *= tl.exp2(between(whole_m, part_m, 0.0, 0.0, rate, clocks is not None))
    if clocks is None:
        through_k = _sum_of_tiles(sums + TILES * plane + at, plane, rows, rows < m, TILES, C)
        distance = (rows[:, None] - rows[None, :]).to(tl.float32)
        total = tl.sum(tl.sum(pairs * distance, 1))
        total += tl.sum(through_q * (rows + 1) + through_k * (m - 1 - rows))
        tl.store(out + chunk * heads + h, total + kept * m)
    else:
        # entry [l, j]: sum of P_ij over queries i >= l, for keys j < l
        across = tl.where(rows[:, None] > rows[None, :], tl.cumsum(pairs, 0, reverse=True), 0.0)
        # sums over the keys before each token
        inside = (rows > 0) & (rows < m)
        through_k = _sum_of_tiles(sums + TILES * plane + at - 1, plane, rows, inside, TILES, C)
        gradient = tl.sum(across, 1) + tl.cumsum(through_q, 0, reverse=True) + tl.cumsum(through_k, 0) + kept
        tl.store(out + (row * length + start + rows) * heads + h, gradient, mask=rows < m)


# ---- one token


@triton.jit
def step(
    q, k, v, log_decay, state, out,
    q_row, q_head, k_row, k_head, v_row, v_head, decay_row, decay_head, decay_key,
    scale, heads, shared,
    K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, TILE_V: tl.constexpr,
):
    """Compute S = decay S + k v^T in place and o = scale q S; one program per V tile, row and head, over all keys."""
    tiles: tl.constexpr = (V + TILE_V - 1) // TILE_V
    pid = tl.program_id(0).to(tl.int64)
    tile, sequence = (pid % tiles).to(tl.int32), pid // tiles
    n, h = sequence // heads, sequence % heads
    ks = tl.arange(0, WIDTH)
    vs = tile * TILE_V + tl.arange(0, TILE_V)
    query = tl.load(q + n * q_row + h // shared * q_head + ks, mask=ks < K, other=0.0).to(tl.float32)
    key = tl.load(k + n * k_row + h // shared * k_head + ks, mask=ks < K, other=0.0).to(tl.float32)
    value = tl.load(v + n * v_row + h * v_head + vs, mask=vs < V, other=0.0).to(tl.float32)
    inside = (ks[:, None] < K) & (vs[None, :] < V)
    place = state + sequence * K * V + ks[:, None] * V + vs[None, :]
    memory = tl.load(place, mask=inside, other=0.0)
    if log_decay is not None:
        # decay_key is 0 if all key dimensions share a decay
        a = tl.load(log_decay + n * decay_row + h * decay_head + ks * decay_key, mask=ks < K, other=0.0)
        memory *= tl.exp2(log2(a))[:, None]
    memory += key[:, None] * value[None, :]
    tl.store(place, memory, mask=inside)
    output = scale * tl.sum(query[:, None] * memory, 0)
    tl.store(out + sequence * V + vs, output.to(out.dtype.element_ty), mask=vs < V)
