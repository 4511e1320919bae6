# ruff: noqa: RET505  a branch that is decided when a kernel is compiled needs its `else`
"""What the Triton kernels of all families are made of: tiles, chunks, and the decays between tokens.

A chunk has m <= C tokens. The clock of a token is the sum of the log2-decays from its chunk's beginning to the token
itself, so what is left of token j at token i >= j is exp2(clock_i - clock_j). Such a difference is formed without loss:

    decay per head          clock_i = (i + 1) rate                 the difference of the counts times the rate
    a decay for each token  clock_i = whole_i + part_i             whole: an integer; part: in [0, 1)

This file and the families' `bodies.py` and `per_key_bodies.py` alone import triton.
"""

# Jitted functions have no types that pyright could follow.
# pyright: basic, reportArgumentType=false, reportOptionalOperand=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

VARYING = ["length", "chunks", "chunks_a_row", "plane"]
"""Sizes that differ from call to call: a kernel is not recompiled for what they are multiples of."""

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
RESET = tl.constexpr(-256.0)
"""The least log2-decay: exp2 of it is 0 in float32, as exp2 of -inf is, and sums of it are exact."""


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr = "ieee"):
    """acc + x y in float32; products of float32 are `ieee`, or `tf32x3`: three of TF32. The interpreter knows the first
    alone, and multiplies 16-bit numbers wrongly, so there they are widened."""
    if INTERPRETED:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def log2(a):
    """A natural log-decay as a log2-decay, not below RESET; nan stays nan."""
    a *= LOG2_E
    return tl.where(a < RESET, RESET, a)


@triton.jit
def load_tile(x, stride, rows, m, columns, WIDTH: tl.constexpr):
    """The rows below m and the columns below WIDTH of x, zero elsewhere: [rows columns]."""
    inside = (rows[:, None] < m) & (columns[None, :] < WIDTH)
    return tl.load(x + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def chunk_at(chunk, table, length, chunks_a_row, C: tl.constexpr):
    """Row of the batch, first token, and number of tokens of a chunk."""
    if table is None:
        row = chunk // chunks_a_row
        start = (chunk % chunks_a_row) * C
        return row, start, tl.minimum(length - start, C)
    else:  # of packed documents the table knows, and gives no tokens to the chunks that are over
        return chunk * 0, tl.load(table + 4 * chunk), tl.load(table + 4 * chunk + 1)


@triton.jit
def state_at(chunk, table, LEAVING: tl.constexpr):
    """Which of the stored states enters a chunk, or leaves it."""
    if table is None:
        return chunk
    else:
        return tl.load(table + 4 * chunk + (3 if LEAVING else 2))


@triton.jit
def rate_of(rates, h):
    """log2 of the head's decay; 0 where decays are not fixed."""
    if rates is None:
        return 0.0
    else:
        return log2(tl.load(rates + h))


@triton.jit
def clock_of(clocks, plane, at, rows, m):
    """The clocks of the rows, in two parts; fixed decays count the tokens."""
    if clocks is None:
        return (rows + 1).to(tl.float32), (rows * 0).to(tl.float32)
    else:
        whole = tl.load(clocks + at + rows, mask=rows < m, other=0.0)
        return whole, tl.load(clocks + plane + at + rows, mask=rows < m, other=0.0)


@triton.jit
def last_clock(clocks, plane, at, m):
    """The clock of the last token: that of the chunk."""
    if clocks is None:
        return m.to(tl.float32), 0.0
    else:
        return tl.load(clocks + at + m - 1), tl.load(clocks + plane + at + m - 1)


@triton.jit
def between(whole, part, whole_0, part_0, rate, TOKEN: tl.constexpr):
    """The log2-decay from one clock to a later one."""
    if TOKEN:
        return (whole - whole_0) + (part - part_0)
    else:
        return (whole - whole_0) * rate


@triton.jit
def sequence_at(n, firsts, length, chunks_a_row, C: tl.constexpr):
    """Row of the batch, first chunk, and number of chunks of a row of states."""
    if firsts is None:
        return n, n * chunks_a_row, tl.cdiv(length, C)
    else:
        first = tl.load(firsts + n).to(tl.int32)
        return n * 0, first, tl.load(firsts + n + 1).to(tl.int32) - first
