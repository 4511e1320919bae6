"""The delta rule's chunkwise op in Triton, for decays that all key dimensions share.

    S_t = P_t + b_t k_t (v_t - k_t^T P_t)^T,  P_t = exp(g_t) S_{t-1}        o_t = scale q_t S_t     (notation of api.py)

The equations inside a chunk are those of chunkwise.py (UT transform of arXiv 2406.06484, decays of arXiv 2412.06464).
What tokens write, U, is found first; with U for v the rest is the decay family's, whose bands compute it:

    solve        T of each chunk, and for backward A^T
    delta_scan   walks the chunks with the state in registers, and stores what enters each, and U
                 backwards, with do: the gradient of what leaves each chunk, and z = T^T dU
    bands        forward    o from U
                 backward   dq, dk  from do and U, as the decay family's
                            dx, dk  from z and U, of the queries x = b k which read with the factor -1, and see only
                                    keys before their own: what tokens predict from

Backward computes T, the states and U again from the chunks' beginnings: forward saves nothing. Then

    dv = b z        dk = both bands' + b dx        db = <z, v> + <k, dx>        dg of both bands, added up

What is stored between the bodies has the inputs' dtype, T and A^T too; sums and the states that walk are float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd import Gradients, Op
from ..decay.triton_launch import Launcher, too_wide
from ..kernels import Kernel, Probe, declare
from ..paradigm import Paradigm
from ..recurrence import Recurrence, RecurrenceOutput
from ..triton_launch import UNIT, Launch, contiguous, interpreted, kernels, missing, padded, readable, strides

MAX_FLOAT32_KEY_WIDTH = 64
"""Products of float32 take registers instead of tensor cores: those of wider keys spill."""


def limits(probe: Probe) -> list[str]:
    """Why the kernels cannot run what they are asked about, beside the dtype."""
    reasons = missing(probe)
    if probe.log_decay == "B T H K":
        reasons.append("one log-decay per key dimension is not supported")
    if probe.dtype == torch.float32 and probe.key_width > MAX_FLOAT32_KEY_WIDTH:
        reasons.append(f"keys of float32 are up to {MAX_FLOAT32_KEY_WIDTH} wide, not {probe.key_width}")
    return reasons + too_wide(probe)


class Configuration(NamedTuple):
    """How the bodies run that are the delta family's own; a tile of the scans holds all keys."""

    solve: Launch
    scan: Launch
    reverse: Launch


def configuration(bits: int, key_width: int) -> Configuration:
    """For elements of so many bits; the bands have the decay family's."""
    width = max(UNIT, 1 << (key_width - 1).bit_length())
    if interpreted():
        small = Launch((width, 32), 1, 1)
        return Configuration(small, small, small)
    scan = Launch((width, 32), 4 if bits == 16 else 8, 2)
    return Configuration(Launch((32, 0), 4, 2), scan, scan._replace(warps=8) if width > 128 else scan)


class DeltaLauncher(Launcher):
    """One call of the op: the decay family's bodies, and the two of its own."""

    def __init__(self, x: Recurrence, needs_log_decay: bool = False) -> None:
        assert x.beta is not None
        # no chunks of more than 64: the rows of their systems are found one after another
        super().__init__(x._replace(chunk_size=min(x.chunk_size, 64)), needs_log_decay)
        if self.decays["clocks"] is not None and self.backward.tile[1] > 64:  # larger steps spill
            self.backward = self.backward._replace(tile=(32, self.backward.tile[1]))
        self.own = configuration(8 * x.q.element_size(), self.key_width)
        self.beta, self.initial_state = x.beta.contiguous(), contiguous(x.initial_state)
        self.squares = (self.chunks, self.heads, self.chunk, self.chunk)
        self.states, self.written = self.new_states(), self.q.new_empty(x.v.shape)
        self.inverse = self.q.new_empty(self.squares)

    def solve(self, weights: Tensor | None = None) -> None:
        """Fill `inverse`, and `weights` if they are wanted."""
        operands, launch = {"q": self.q, "k": self.k}, self.own.solve
        kernels("delta").solve[(self.chunks * self.heads,)](
            beta=self.beta,
            inverse=self.inverse,
            weights=weights,
            table=self.table,
            chunks=self.chunks,
            TILE_INNER=launch.tile[0],
            **operands,
            **strides(**operands),
            **{name: value for name, value in self.common.items() if name != "V"},
            **launch.options,
        )

    def walk(self, v: Tensor, states: Tensor, written: Tensor, *, reverse: bool = False, **ends: Tensor | None) -> None:
        """Fill `states`, `written`, and of `ends` what is wanted; in reverse, v is do."""
        operands, launch = {"q": self.q, "k": self.k, "v": v}, self.own.reverse if reverse else self.own.scan
        kernels("delta").delta_scan[(self.tiles * self.rows * self.heads,)](
            states=states,
            written=written,
            beta=self.beta,
            inverse=self.inverse,
            **{name: ends.get(name) for name in ("weights", "initial", "final", "entries", "products")},
            boundaries=self.boundaries,
            firsts=self.firsts,
            TILE_K=launch.tile[0],
            TILE_V=launch.tile[1],
            REVERSE=reverse,
            **operands,
            **strides(**operands),
            **self.common,
            **launch.options,
        )

    def forward(self, final: Tensor | None = None, weights: Tensor | None = None) -> None:
        """Fill `states` and `written`: what enters each chunk, and U."""
        self.solve(weights)
        self.walk(self.v, self.states, self.written, initial=self.initial_state, final=final)

    @property
    def tiles(self) -> int:
        """Tiles of a state."""
        return -(-self.value_width // self.own.scan.tile[1])


def _allocate(x: Recurrence) -> tuple[Tensor, Tensor]:
    # here, inside the op, a compiler does not look
    KERNEL.require(x.probe())
    return x.q.new_empty(x.v.shape), x.q.new_empty(
        (x.rows, *x.matrix) if x.output_final_state else 0, dtype=torch.float32
    )


def _forward(x: Recurrence) -> tuple[Tensor, Tensor]:
    output, final_state = _allocate(x)
    call = DeltaLauncher(x)
    call.forward(final_state if x.output_final_state else None)
    call.reading(v=call.written).forward_band(call.states, output)
    return output, final_state


def _backward(x: Recurrence, gradients: Gradients) -> dict[str, Tensor]:
    d_output, d_final_state = gradients.outputs
    needs_log_decay = x.log_decay is not None and "log_decay" in gradients.wanted
    call = DeltaLauncher(x, needs_log_decay)
    do = readable(torch.zeros_like(x.v) if d_output is None else d_output, call.chunk)
    weights = torch.empty_like(call.inverse)
    call.forward(weights=weights)
    found = {} if call.initial_state is None else {"initial_state": torch.empty_like(call.initial_state)}
    d_final = None if d_final_state is None or not d_final_state.numel() else d_final_state.contiguous()
    ends, sums, products = {"initial": d_final, "final": found.get("initial_state"), "weights": weights}, None, None
    if needs_log_decay:
        products = call.beta.new_empty(call.chunks, call.heads, call.tiles, dtype=torch.float32)
        sums = products.new_empty(2, 2, call.key_tiles, call.batch, call.heads, call.length)
        ends |= {"entries": call.states, "products": products}
    d_states, solved = call.new_states(), torch.empty_like(call.written)
    call.walk(do, d_states, solved, reverse=True, **ends)

    rate = call.beta[..., None].float()
    written = call.reading(v=call.written)
    predicting = call.reading(-1.0, v=call.written, q=(rate * x.k).to(x.k.dtype))
    dq, dk, dx, more = (x.q.new_empty(x.q.shape) for _ in range(4))
    results = {"dq": dq, "dk": dk, "dv": None, "sums": None if sums is None else sums[0]}
    written.backward_band(do, results, states=call.states, d_states=d_states)
    results = {"dq": dx, "dk": more, "dv": None, "sums": None if sums is None else sums[1]}
    predicting.backward_band(solved, results, strict=True, states=call.states, d_states=None)
    wide, dx = solved.float(), dx.float()
    found |= {"q": dq, "k": (dk.float() + more).addcmul_(rate, dx), "v": rate * wide}
    found["beta"] = torch.linalg.vecdot(wide, x.v.float()) + torch.linalg.vecdot(dx, x.k.float())
    if x.log_decay is not None and sums is not None:
        found["log_decay"], other = (x.log_decay.new_empty(x.log_decay.shape) for _ in range(2))
        written.decay_gradient(do, sums[0], products, found["log_decay"])
        predicting.decay_gradient(solved, sums[1], None, other)
        found["log_decay"] += other
    return found


CHUNKWISE = Op("delta_chunkwise_triton", Recurrence, fake=_allocate, forward=_forward, backward=_backward, outputs=2)


def delta_chunkwise_triton(x: Recurrence) -> RecurrenceOutput:
    """The chunkwise paradigm on a GPU, for decays that all key dimensions share.

    Chunks have 64 tokens at most: 32 where inputs are float32.

    Raises:
        SeqmixError: `KERNEL` does not take this.
    """
    return padded(CHUNKWISE, x)


KERNEL = declare(
    Kernel(
        op="delta",
        paradigm=Paradigm.CHUNKWISE,
        backend="triton",
        function=delta_chunkwise_triton,
        tolerances={torch.float32: 2e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3},
        limits=limits,
    )
)
