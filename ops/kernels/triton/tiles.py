# ruff: noqa: RET505  a branch that is decided when a kernel is compiled needs its `else`
"""Building blocks of all Triton kernels: loading tiles, locating chunks, and decays between tokens.

A chunk has m <= C tokens. The clock of a token is the sum of the log2-decays from the start of its chunk up to and
including the token, so the decay from token j to a later token i is exp2(clock_i - clock_j). Clocks are stored so that
this difference loses no precision:

    one decay per head      clock_i = (i + 1) rate                 difference of the counts, times the rate
    one decay per token     clock_i = whole_i + part_i             whole: an integer; part: in [0, 1)

Only this file and the families' `bodies.py` and `per_key_bodies.py` import triton.
"""

# Jitted functions have no types that pyright could follow.
# pyright: basic, reportArgumentType=false, reportOptionalOperand=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

VARYING = ["length", "chunks", "chunks_a_row", "plane"]
"""Sizes that vary between calls: Triton must not specialise (recompile) a kernel for them."""

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
RESET = tl.constexpr(-256.0)
"""Lower bound of log2-decays. Its exp2 is 0 in float32, like exp2 of -inf, and unlike -inf it can be subtracted."""


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr = "ieee"):
    """Return acc + x y in float32.

    PRECISION of float32 products is `ieee`, or `tf32x3` for three TF32 products. The interpreter supports only `ieee`
    and multiplies 16-bit numbers wrongly, so there operands are cast to float32.
    """
    if INTERPRETED:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def log2(a):
    """Convert a natural log-decay to a log2-decay, at least RESET; nan stays nan."""
    a *= LOG2_E
    return tl.where(a < RESET, RESET, a)


@triton.jit
def load_tile(x, stride, rows, m, columns, WIDTH: tl.constexpr):
    """Load a tile [rows columns] of x; zero for rows from m and columns from WIDTH on."""
    inside = (rows[:, None] < m) & (columns[None, :] < WIDTH)
    return tl.load(x + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def chunk_at(chunk, table, length, chunks_a_row, C: tl.constexpr):
    """Return a chunk's row of the batch, first token and number of tokens."""
    if table is None:
        row = chunk // chunks_a_row
        start = (chunk % chunks_a_row) * C
        return row, start, tl.minimum(length - start, C)
    else:  # packed documents have a table; surplus chunks in it have 0 tokens
        return chunk * 0, tl.load(table + 4 * chunk), tl.load(table + 4 * chunk + 1)


@triton.jit
def state_at(chunk, table, LEAVING: tl.constexpr):
    """Return the index of the stored state that enters a chunk, or of the gradient that leaves it."""
    if table is None:
        return chunk
    else:
        return tl.load(table + 4 * chunk + (3 if LEAVING else 2))


@triton.jit
def rate_of(rates, h):
    """Return the log2-decay of a head; 0 if decays are not fixed per head."""
    if rates is None:
        return 0.0
    else:
        return log2(tl.load(rates + h))


@triton.jit
def clock_of(clocks, plane, at, rows, m):
    """Return the clocks of the rows as (whole, part); with fixed decays, the count of tokens and 0."""
    if clocks is None:
        return (rows + 1).to(tl.float32), (rows * 0).to(tl.float32)
    else:
        whole = tl.load(clocks + at + rows, mask=rows < m, other=0.0)
        return whole, tl.load(clocks + plane + at + rows, mask=rows < m, other=0.0)


@triton.jit
def last_clock(clocks, plane, at, m):
    """Return the clock of the chunk's last token, as (whole, part)."""
    if clocks is None:
        return m.to(tl.float32), 0.0
    else:
        return tl.load(clocks + at + m - 1), tl.load(clocks + plane + at + m - 1)


@triton.jit
def between(whole, part, whole_0, part_0, rate, TOKEN: tl.constexpr):
    """Return the log2-decay from the clock (whole_0, part_0) to the later clock (whole, part)."""
    if TOKEN:
        return (whole - whole_0) + (part - part_0)
    else:
        return (whole - whole_0) * rate


@triton.jit
def sequence_at(n, firsts, length, chunks_a_row, C: tl.constexpr):
    """Return the row of the batch, the first chunk and the number of chunks of sequence n (a row or a document)."""
    if firsts is None:
        return n, n * chunks_a_row, tl.cdiv(length, C)
    else:
        first = tl.load(firsts + n).to(tl.int32)
        return n * 0, first, tl.load(firsts + n + 1).to(tl.int32) - first
