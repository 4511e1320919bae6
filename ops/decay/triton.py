"""The decay family's chunkwise op and its decode step in Triton.

    S_t = exp(a_t) S_{t-1} + k_t v_t^T        o_t = scale q_t S_t        (notation of decay.py)

for decays that all key dimensions share: log_decay None, [H] or [B T H] (the step takes [B T H K] too). Tokens are cut
into chunks of C. Three bodies compute everything (decay_triton_kernels.py):

    state_scan   walks the chunks with one tile of the state in registers, and stores what enters each chunk
                 backwards, with (q, do) for (k, v), the gradient of what leaves it
    band         factor (X S) + (mask * (X Y^T)) Z inside a chunk, for one tile of columns
                     o    X = q    Y = k    Z = v    the state that enters
                     dq   X = do   Y = v    Z = k    the same, transposed
                     dk   X = v    Y = do   Z = q    the gradient of the state that leaves, transposed; mask reversed
                     dv   X = k    Y = q    Z = do   the same; mask reversed
    step         one token: the state is read, updated in place, and read out

That a state between chunks and a band inside them is enough is Eq. 7 of the RetNet paper (arXiv 2307.08621) and its
derivative; a band for all four products is what lets dq, dk and dv be one launch, which reads the chunk once. Decays a
token and head, which the paper does not have, enter through the clocks of decay_triton_kernels.py, and the gradient of
a log-decay is that of decay_chunkwise.py.

Accumulators, decays, and the states that walk are float32. What is stored between the bodies has the inputs' dtype,
since it is an operand of a matrix product next; in float16 a state beyond 65,504 overflows there. Products of float32
are float32, never TF32.

This module needs no triton: it is imported where a kernel is launched.
"""

import os
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ...registry import SeqmixError
from ..autograd import has_tangent, needs_grad, refuse_tangents
from ..chunks import capacity
from ..donation import may_overwrite
from ..kernels import Kernel, Probe, declare, installed
from ..paradigm import Paradigm
from .api import NO_TANGENTS, TOLERANCES, DecayOutput, LogDecay, decay_recurrent, probe_of, require_inputs
from .chunkwise import differentiate_by

MAX_KEY_WIDTH, MAX_VALUE_WIDTH = 256, 512
"""The paper's head."""

UNIT = 16
"""Widths are padded to a multiple of it: matrix instructions and 16-byte loads want no less."""


# ---- configurations

FUSED = {"enable_fp_fusion": True}
"""A product and a sum are one instruction; said, since Triton's default is about to change."""


class Launch(NamedTuple):
    """How one body runs."""

    tile: tuple[int, int]
    """Of a scan, keys and values of a state's tile; of a band, inner widths a step and columns of the result."""
    warps: int
    stages: int
    """Steps of a loop whose loads are in flight at once."""

    @property
    def options(self) -> dict[str, Any]:
        """For the launcher."""
        return {"num_warps": self.warps, "num_stages": self.stages, **FUSED}


class Configuration(NamedTuple):
    """How the chunkwise bodies run for one kind of input."""

    chunk: int
    """C, tokens."""
    scan: Launch
    forward: Launch
    backward: Launch
    decay_backward: Launch
    """The backward band where decays are given for each token, or a log-decay has a gradient: clocks and the sums that
    the gradient needs take registers."""


def configurations(bits: int, width: int) -> tuple[Configuration, ...]:
    """The table for GPUs; the largest chunk first.

    Args:
        bits: of an element of q, k and v.
        width: of keys or values, whichever is wider.
    """
    if bits == 32:
        return (
            Configuration(
                chunk=32,
                scan=Launch((64, 64), 8, 3),
                forward=Launch((32, 64), 8, 2),
                backward=Launch((32, 32), 4, 2),
                decay_backward=Launch((32, 32), 4, 2),
            ),
        )
    outer = 64 if width <= 64 else 128
    return (
        Configuration(
            chunk=128,
            scan=Launch((64, outer), 8, 3),
            forward=Launch((64, outer), 8, 3),
            backward=Launch((64, outer), 8, 3),
            decay_backward=Launch((64, 64), 8, 3),
        ),
        Configuration(
            chunk=64,
            scan=Launch((64, outer), 4, 3),
            forward=Launch((64, outer), 4, 3),
            backward=Launch((64, outer), 4, 3),
            decay_backward=Launch((64, outer), 4, 3),
        ),
    )


_SMALL = Launch((16, 32), 1, 1)
INTERPRETED = tuple(Configuration(chunk, _SMALL, _SMALL, _SMALL, _SMALL) for chunk in (32, 16))
"""The table for the interpreter: small, so that short inputs have several of everything."""

STEP = Launch((MAX_KEY_WIDTH, 32), 4, 1)
"""One token: the tile holds all keys."""


def choose(table: tuple[Configuration, ...], chunk_size: int) -> Configuration:
    """The largest chunk that is not larger than asked for, or else the smallest there is."""
    return next((found for found in table if found.chunk <= chunk_size), table[-1])


def _configuration(q: Tensor, v: Tensor, chunk_size: int) -> Configuration:
    if _interpreted():
        return choose(INTERPRETED, chunk_size)
    table = configurations(8 * q.element_size(), max(q.shape[3], v.shape[3]))
    if torch.cuda.get_device_capability(q.device) != (9, 0):
        # the large ones are known to fit Hopper, and the smallest fits what has less shared memory
        return table[-1]
    return choose(table, chunk_size)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kernels() -> Any:
    """The jitted functions; imports triton."""
    return import_module(f"{__package__}.triton_kernels")


# ---- what is taken


def limits(probe: Probe) -> list[str]:
    """Why the chunkwise kernels cannot run what they are asked about, beside the dtype."""
    reasons = _missing(probe)
    if probe.log_decay == "B T H K":
        reasons.append("a log-decay a key dimension is not taken")
    if probe.key_width > MAX_KEY_WIDTH or probe.value_width > MAX_VALUE_WIDTH:
        reasons.append(
            f"keys are up to {MAX_KEY_WIDTH} wide and values up to {MAX_VALUE_WIDTH}, "
            f"not {probe.key_width} and {probe.value_width}"
        )
    return reasons


def step_limits(probe: Probe) -> list[str]:
    """Why the step cannot run what it is asked about, beside the dtype."""
    reasons = _missing(probe)
    if probe.key_width > MAX_KEY_WIDTH:
        reasons.append(f"keys are up to {MAX_KEY_WIDTH} wide, not {probe.key_width}")
    return reasons


def _missing(probe: Probe) -> list[str]:
    """What is not there that every kernel here needs."""
    reasons = []
    if not installed("triton"):
        reasons.append("triton is not installed (pip install 'seqmix[gpu]', on Linux)")
    if _interpreted():
        if probe.dtype == torch.bfloat16:
            reasons.append("bfloat16 is wrong in Triton's interpreter")
    elif probe.device.type != "cuda":
        reasons.append(
            f"it needs a CUDA device and not {probe.device.type}, or TRITON_INTERPRET=1 before triton is imported"
        )
    return reasons


# ---- the public functions


def decay_chunkwise_triton(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: LogDecay,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
    chunk_size: int = 128,
) -> DecayOutput:
    """`decay_chunkwise` on a GPU, for decays that all key dimensions share; arguments and result are its own.

    The chunks are the largest of the table that are not larger than `chunk_size`.

    Raises:
        SeqmixError: shapes do not fit, or `KERNEL` does not take this.
    """
    scale = require_inputs(q, k, v, log_decay, scale, initial_state, cu_seqlens, chunk_size)
    refuse_tangents(NO_TANGENTS, q, k, v, log_decay, initial_state)
    key_width, value_width = q.shape[3], v.shape[3]
    more_keys, more_values = -key_width % UNIT, -value_width % UNIT
    if log_decay is not None:
        log_decay = log_decay.float()
    if initial_state is not None:
        initial_state = initial_state.float()
    if more_keys or more_values:
        q, k, v = F.pad(q, (0, more_keys)), F.pad(k, (0, more_keys)), F.pad(v, (0, more_values))
        if initial_state is not None:
            initial_state = F.pad(initial_state, (0, more_values, 0, more_keys))
    backward = needs_grad(q, k, v, log_decay, initial_state)
    output, state, _ = chunkwise_op(
        q, k, v, log_decay, initial_state, cu_seqlens, scale, chunk_size, output_final_state, backward
    )
    if more_keys or more_values:
        output = output[..., :value_width]
        if output_final_state:
            # a copy: a view would keep the padding alive
            state = state[..., :key_width, :value_width].contiguous()
    return DecayOutput(output, state if output_final_state else None)


def decay_recurrent_triton(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: LogDecay,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "N H K V"] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Int[Tensor, "N+1"] | None = None,
) -> DecayOutput:
    """`decay_recurrent` on a GPU; arguments and result are its own.

    One token without gradients is one kernel, which writes the final state over the initial one where that is
    donated (`donate_state`), and over a copy elsewhere. More tokens, documents and gradients are the reference's.

    Raises:
        SeqmixError: shapes do not fit, or `STEP_KERNEL` does not take this.
    """
    checked = require_inputs(q, k, v, log_decay, scale, initial_state, cu_seqlens)
    tensors = (q, k, v, log_decay, initial_state)
    STEP_KERNEL.require(probe_of(*tensors))
    if q.shape[1] > 1 or cu_seqlens is not None or needs_grad(*tensors) or has_tangent(*tensors):
        return decay_recurrent(
            *tensors[:4],
            scale=scale,
            initial_state=initial_state,
            output_final_state=output_final_state,
            cu_seqlens=cu_seqlens,
        )
    state = initial_state
    if state is None:
        state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[3], dtype=torch.float32)
    elif not (output_final_state and may_overwrite() and state.dtype == torch.float32 and state.is_contiguous()):
        state = state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    output = step_op(q, k, v, None if log_decay is None else log_decay.float(), state, checked)
    return DecayOutput(output, state if output_final_state else None)


def decay_step_triton(
    q: Float[Tensor, "B 1 H K"],
    k: Float[Tensor, "B 1 H K"],
    v: Float[Tensor, "B 1 H V"],
    log_decay: LogDecay,
    state: Float[Tensor, "B H K V"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "B 1 H V"]:
    """One token for decoding: the state is updated in place, and nothing waits for the device.

    Args:
        q: queries.
        k: keys.
        v: values.
        log_decay: natural log of the decay, <= 0, -inf allowed; None means no decay.
        state: float32 and contiguous; read, decayed, added to, and written where it lies.
        scale: factor of the output, 1/sqrt(K) by default.

    Raises:
        SeqmixError: shapes do not fit, a gradient is wanted, or `STEP_KERNEL` does not take this.
    """
    scale = require_inputs(q, k, v, log_decay, scale, state, None)
    if q.shape[1] != 1:
        raise SeqmixError(f"a step is one token, and given are {q.shape[1]}")
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise SeqmixError("a state that is updated in place must be float32 and contiguous")
    if needs_grad(q, k, v, log_decay, state):
        raise SeqmixError("a step in place has no gradient: decode under torch.no_grad()")
    refuse_tangents(NO_TANGENTS, q, k, v, log_decay, state)
    return step_op(q, k, v, None if log_decay is None else log_decay.float(), state, scale)


# ---- launching


class _Call:
    """One call of the chunkwise op: what its bodies have in common, and how each is launched."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        chunk_size: int,
        needs_log_decay: bool = False,
    ) -> None:
        self.kernels = _kernels()
        self.configuration = _configuration(q, v, chunk_size)
        self.chunk = self.configuration.chunk
        full = needs_log_decay or (log_decay is not None and log_decay.ndim == 3)
        self.backward = self.configuration.decay_backward if full else self.configuration.backward
        self.q, self.k, self.v = (_readable(x, self.chunk) for x in (q, k, v))
        self.batch, self.length, self.heads, self.key_width = q.shape
        self.value_width = v.shape[3]
        self.log_decay = None if log_decay is None else log_decay.contiguous()
        self.borders, self.firsts, self.table = cu_seqlens, None, None
        if cu_seqlens is not None:
            self.firsts, self.table = chunk_table(cu_seqlens, self.length, self.chunk)
        self.rows = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.chunks = self.batch * capacity(self.length, self.chunk, cu_seqlens)
        self.common = {
            "length": self.length,
            "heads": self.heads,
            "chunks_a_row": -(-self.length // self.chunk),
            "plane": self.batch * self.heads * self.length,
            "C": self.chunk,
        }
        self.in_bands = self.common | {
            "table": self.table,
            "chunks": self.chunks,
            "scale": scale,
            "K": self.key_width,
            "V": self.value_width,
            **{"q": self.q, "k": self.k, "v": self.v},
            **_strides(q=self.q, k=self.k, v=self.v),
        }
        self.scale = scale

    @property
    def rates(self) -> Tensor | None:
        """Decays fixed a head."""
        return self.log_decay if self.log_decay is not None and self.log_decay.ndim == 1 else None

    @cached_property
    def clocks(self) -> Tensor | None:
        """Of decays that are given for each token: [2 B H T]."""
        if self.log_decay is None or self.log_decay.ndim == 1:
            return None
        clocks = self.log_decay.new_empty(2, self.batch, self.heads, self.length)
        self.kernels.clocks[(self.chunks * self.heads,)](
            log_decay=self.log_decay, clocks=clocks, table=self.table, chunks=self.chunks, **self.common, **FUSED
        )
        return clocks

    def new_states(self) -> Tensor:
        """Room for a state a chunk, as narrow as the inputs."""
        return self.q.new_empty(self.chunks, self.heads, self.key_width, self.value_width)

    @property
    def scan_tiles(self) -> int:
        """Tiles of a state as the scan has them."""
        tile_k, tile_v = self.configuration.scan.tile
        return -(-self.key_width // tile_k) * -(-self.value_width // tile_v)

    def scan(
        self,
        x: Tensor,
        w: Tensor,
        states: Tensor,
        initial: Tensor | None,
        final: Tensor | None,
        *,
        reverse: bool = False,
        entries: Tensor | None = None,
        products: Tensor | None = None,
    ) -> None:
        """Fill `states`, and `final` if it is wanted."""
        launch = self.configuration.scan
        self.kernels.state_scan[(self.scan_tiles * self.rows * self.heads,)](
            x=x,
            w=w,
            rates=self.rates,
            clocks=self.clocks,
            initial=initial,
            states=states,
            final=final,
            entries=entries,
            products=products,
            borders=self.borders,
            firsts=self.firsts,
            scale=self.scale,
            K=self.key_width,
            V=self.value_width,
            TILE_K=launch.tile[0],
            TILE_V=launch.tile[1],
            REVERSE=reverse,
            **_strides(x=x, w=w),
            **self.common,
            **launch.options,
        )

    def forward_band(self, states: Tensor, output: Tensor) -> None:
        """Fill `output`."""
        launch = self.configuration.forward
        tiles = -(-self.value_width // launch.tile[1])
        self.kernels.band_forward[(tiles * self.chunks * self.heads,)](
            rates=self.rates,
            clocks=self.clocks,
            states=states,
            out=output,
            TILE_INNER=launch.tile[0],
            TILE_OUTER=launch.tile[1],
            **self.in_bands,
            **launch.options,
        )

    @property
    def key_tiles(self) -> int:
        """Tiles of dq and dk."""
        return -(-self.key_width // self.backward.tile[1])

    def backward_band(
        self,
        do: Tensor,
        states: Tensor,
        d_states: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        sums: Tensor | None,
    ) -> None:
        """Fill dq, dk, dv, and `sums` if they are wanted."""
        launch = self.backward
        roles = 2 * self.key_tiles - (-self.value_width // launch.tile[1])
        self.kernels.band_backward[(roles * self.chunks * self.heads,)](
            do=do,
            rates=self.rates,
            clocks=self.clocks,
            states=states,
            d_states=d_states,
            dq=dq,
            dk=dk,
            dv=dv,
            sums=sums,
            TILE_INNER=launch.tile[0],
            TILE_OUTER=launch.tile[1],
            **self.in_bands,
            **_strides(do=do),
            **launch.options,
        )

    def decay_gradient(self, do: Tensor, sums: Tensor, products: Tensor, out: Tensor) -> None:
        """Fill `out`, the gradient of the log-decay."""
        launch = self.backward
        by_chunk = out if self.rates is None else out.new_zeros(self.chunks, self.heads)
        self.kernels.decay_gradient[(self.chunks * self.heads,)](
            do=do,
            rates=self.rates,
            clocks=self.clocks,
            sums=sums,
            products=products,
            out=by_chunk,
            TILE_INNER=launch.tile[0],
            TILES=self.key_tiles,
            PRODUCTS=self.scan_tiles,
            **self.in_bands,
            **_strides(do=do),
            **launch.options,
        )
        if self.rates is not None:
            out.copy_(by_chunk.sum(0))


def chunk_table(cu_seqlens: Tensor, length: int, chunk: int) -> tuple[Tensor, Tensor]:
    """How packed documents are cut; nothing waits for the device.

    Returns:
        each document's first chunk [N + 1], and each chunk's first token and number of tokens [chunks 2], which is 0
        for those that are over: there is room for as many as there can be.
    """
    borders = cu_seqlens.long()
    firsts = F.pad(((borders.diff() + chunk - 1) // chunk).cumsum(0), (1, 0))
    documents = borders.shape[0] - 1
    number = torch.arange(capacity(length, chunk, cu_seqlens), device=borders.device)
    document = (torch.searchsorted(firsts, number, right=True) - 1).clamp_(max=documents - 1)
    start = borders[document] + (number - firsts[document]) * chunk
    tokens = (borders[document + 1] - start).clamp_(0, chunk)
    return firsts, torch.stack((start, tokens), dim=1)


def _readable(x: Tensor, chunk: int) -> Tensor:
    """x [B T H D] as it lies, if its rows are contiguous and a chunk's offsets fit 32 bits."""
    return x if x.stride(3) == 1 and min(chunk, x.shape[1]) * x.stride(1) < 2**31 else x.contiguous()


def _strides(**tensors: Tensor) -> dict[str, int]:
    """As the jitted functions name them."""
    axes = ("row", "token", "head")
    return {f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate(axes)}


# ---- the ops


@torch.library.custom_op("seqmix::decay_chunkwise_triton", mutates_args=())
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
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state [N H K V] and chunk entry states [chunks H K V]; the last two are empty unless kept."""
    output, final_state, entries = _allocate(
        q, k, v, log_decay, initial_state, cu_seqlens, scale, chunk_size, output_final_state, needs_grad
    )
    call = _Call(q, k, v, log_decay, cu_seqlens, scale, chunk_size)
    states = entries if entries.numel() else call.new_states()
    initial = None if initial_state is None else initial_state.contiguous()
    call.scan(call.k, call.v, states, initial, final_state if output_final_state else None)
    call.forward_band(states, output)
    return output, final_state, entries


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
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # here, inside the ops, a compiler does not look
    KERNEL.require(probe_of(q, k, v, log_decay, initial_state))
    batch, length, heads, key_width = q.shape
    value_width = v.shape[3]
    rows = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = (rows, heads, key_width, value_width) if output_final_state else (0,)
    final_state = q.new_empty(final, dtype=torch.float32)
    chunk = _configuration(q, v, chunk_size).chunk
    # kept where they are no larger than half of q, k and v; elsewhere the backward scans again
    if not needs_grad or 2 * key_width * value_width > chunk * (2 * key_width + value_width):
        return q.new_empty(v.shape), final_state, q.new_empty(0)
    entries = (batch * capacity(length, chunk, cu_seqlens), heads, key_width, value_width)
    # packed documents leave chunks over, and an output has to be defined everywhere
    return q.new_empty(v.shape), final_state, q.new_empty(entries) if cu_seqlens is None else q.new_zeros(entries)


@torch.library.custom_op("seqmix::decay_chunkwise_triton_backward", mutates_args=())
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
    call = _Call(q, k, v, log_decay, cu_seqlens, scale, chunk_size, needs_log_decay)
    do = _readable(d_output, call.chunk)
    states = entries
    if not entries.numel():
        states = call.new_states()
        initial = None if initial_state is None else initial_state.contiguous()
        call.scan(call.k, call.v, states, initial, None)
    sums = products = None
    if needs_log_decay:
        sums = d_log_decay.new_empty(2, call.key_tiles, *(call.batch, call.heads, call.length))
        products = d_log_decay.new_empty(call.chunks, call.heads, call.scan_tiles)
    d_states = call.new_states()
    call.scan(
        call.q,
        do,
        d_states,
        None if d_final_state is None else d_final_state.contiguous(),
        None if initial_state is None else d_initial,
        reverse=True,
        entries=states if needs_log_decay else None,
        products=products,
    )
    call.backward_band(do, states, d_states, dq, dk, dv, sums)
    if sums is not None and products is not None:
        call.decay_gradient(do, sums, products, d_log_decay)
    return dq, dk, dv, d_log_decay, d_initial


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
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        like(log_decay if needs_log_decay else None),
        like(initial_state),
    )


differentiate_by(chunkwise_op, chunkwise_backward_op)


@torch.library.custom_op("seqmix::decay_step_triton", mutates_args=("state",))
def step_op(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float) -> Tensor:
    """The output of one token; `state` is updated."""
    output = _allocate_step(q, k, v, log_decay, state, scale)
    batch, _, heads, key_width = q.shape
    value_width, tile = v.shape[3], STEP.tile[1]
    q, k, v = (_readable(x, 1) for x in (q, k, v))
    row, head, key = 0, 0, 0
    if log_decay is not None and log_decay.ndim == 1:
        head = log_decay.stride(0)
    elif log_decay is not None:
        row, _, head, *keys = log_decay.stride()
        key = sum(keys)
    _kernels().step[(-(-value_width // tile) * batch * heads,)](
        q=q,
        k=k,
        v=v,
        log_decay=log_decay,
        state=state,
        out=output,
        q_row=q.stride(0),
        q_head=q.stride(2),
        k_row=k.stride(0),
        k_head=k.stride(2),
        v_row=v.stride(0),
        v_head=v.stride(2),
        decay_row=row,
        decay_head=head,
        decay_key=key,
        scale=scale,
        heads=heads,
        K=key_width,
        V=value_width,
        WIDTH=max(UNIT, 1 << (key_width - 1).bit_length()),
        TILE_V=tile,
        **STEP.options,
    )
    return output


@step_op.register_fake
def _allocate_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor, scale: float) -> Tensor:
    STEP_KERNEL.require(probe_of(q, k, v, log_decay, state))
    return q.new_empty(v.shape)


KERNEL = declare(
    Kernel(
        op="decay",
        paradigm=Paradigm.CHUNKWISE,
        backend="triton",
        function=decay_chunkwise_triton,
        tolerances={torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.3e-3},
        limits=limits,
    )
)

STEP_KERNEL = declare(
    Kernel(
        op="decay",
        paradigm=Paradigm.RECURRENT,
        backend="triton",
        function=decay_recurrent_triton,
        tolerances={dtype: TOLERANCES[dtype] for dtype in KERNEL.tolerances},
        limits=step_limits,
    )
)
