"""The delta rule's chunkwise op in Triton.

    S_t = P_t + b_t k_t (v_t - k_t^T P_t)^T,  P_t = diag(exp(g_t)) S_{t-1}    o_t = scale q_t S_t

Notation of ops/delta. The equations inside a chunk are those of ops/delta/chunkwise.py (UT transform of arXiv
2406.06484, decays of arXiv 2412.06464 and 2510.26692). What tokens write, U, is found first; with U for v the rest is
the decay family's, whose bands compute it:

    solve        T of each chunk, and for backward A
    delta_scan   walks the chunks with the state in registers, and stores what enters each, and U
                 backwards, with do: the gradient of what leaves each chunk, and z = T^T dU
    bands        forward    o from U
                 backward   dq, dk  from do and U, as the decay family's
                            dx, dk  from z and U, of the queries x = b k which read with the factor -1, and see only
                                    keys before their own: what tokens predict from

Backward computes T, the states and U again from the chunks' beginnings: forward saves nothing. Then

    dv = b z        dk = both bands' + b dx        db = <z, v> + <k, dx>        dg of both bands, added up

Where every key dimension decays by itself, ../decay/per_key_launch.py has the bands. It forms what has decayed and all
pairs first, so that scans know but the decays of whole chunks.

What is stored between the bodies has the inputs' dtype, T and A too; sums and the states that walk are float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ....recurrence.family import Recurrence, RecurrenceOutput
from ....runtime.custom_op import Gradients, Op
from ....runtime.kernel import Kernel, Probe, declare
from ....runtime.paradigm import Paradigm
from ..decay.launch import too_wide
from ..decay.per_key_launch import launcher_of
from ..launch import UNIT, Launch, contiguous, interpreted, kernels, missing, padded, readable, strides

MAX_FLOAT32_KEY_WIDTH = 64
"""Products of float32 take registers instead of tensor cores: those of wider keys spill."""
MAX_DECAYED_KEY_WIDTH = 128
"""Of keys that decay by themselves, a scan holds two forms at once: wider ones exceed a block's memory."""


def limits(probe: Probe) -> list[str]:
    """Why the kernels cannot run what they are asked about, beside the dtype."""
    reasons = missing(probe)
    if probe.dtype == torch.float32 and probe.key_width > MAX_FLOAT32_KEY_WIDTH:
        reasons.append(f"keys of float32 are up to {MAX_FLOAT32_KEY_WIDTH} wide, not {probe.key_width}")
    elif probe.log_decay == "B T H K" and probe.key_width > MAX_DECAYED_KEY_WIDTH:
        reasons.append(f"keys that decay by themselves are up to {MAX_DECAYED_KEY_WIDTH} wide, not {probe.key_width}")
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


class DeltaLauncher:
    """One call of the op: the two bodies of its own, and the decay family's as `bands`."""

    def __init__(self, x: Recurrence, needs_log_decay: bool = False, *, d_final: bool = False) -> None:
        assert x.beta is not None
        # no chunks of more than 64: the rows of their systems are found one after another
        self.bands = bands = launcher_of(x._replace(chunk_size=min(x.chunk_size, 64)), needs_log_decay, d_final=d_final)
        if bands.decays["clocks"] is not None and bands.backward.tile[1] > 64:  # larger steps spill
            bands.backward = bands.backward._replace(tile=(32, bands.backward.tile[1]))
        self.own = configuration(8 * x.q.element_size(), bands.key_width)
        self.beta, self.initial_state = x.beta.contiguous(), contiguous(x.initial_state)
        self.states, self.written = bands.new_states(bands.entries), x.q.new_empty(x.v.shape)
        self.inverse = x.q.new_empty(bands.chunks, bands.heads, bands.chunk, bands.chunk)
        self.weights = bands.scores

    def solve(self, weights: Tensor | None) -> None:
        """Fill `inverse`, and `weights` if they are wanted."""
        bands, launch = self.bands, self.own.solve
        operands = {"q": bands.q, "k": bands.k}
        kernels("delta").solve[(bands.chunks * bands.heads,)](
            beta=self.beta,
            pairs=bands.pairs,
            inverse=self.inverse,
            weights=weights,
            table=bands.table,
            chunks=bands.chunks,
            TILE_INNER=launch.tile[0],
            **operands,
            **strides(**operands),
            **{name: value for name, value in bands.common.items() if name != "V"},
            **launch.options,
        )

    def walk(self, v: Tensor, states: Tensor, written: Tensor, *, reverse: bool = False, **ends: Tensor | None) -> None:
        """Fill `states`, `written`, and of `ends` what is wanted; in reverse, v is do."""
        bands, launch = self.bands, self.own.reverse if reverse else self.own.scan
        operands = {"q": bands.queries, "k": bands.keys, "v": v}
        kernels("delta").delta_scan[(self.tiles * bands.rows * bands.heads,)](
            states=states,
            written=written,
            beta=self.beta,
            inverse=self.inverse,
            weights=self.weights if reverse else None,
            **{name: ends.get(name) for name in ("initial", "final", "entries", "products")},
            totals=bands.totals,
            reads=bands.reads,
            firsts=bands.firsts,
            table=bands.table,
            TILE_K=launch.tile[0],
            TILE_V=launch.tile[1],
            REVERSE=reverse,
            **operands,
            **strides(**operands),
            **bands.common,
            **launch.options,
        )

    def forward(self, final: Tensor | None = None, *, weights: bool = False) -> None:
        """Fill `states` and `written`: what enters each chunk, and U; and A if it is wanted."""
        missing = weights and self.weights is None
        if missing:
            self.weights = torch.empty_like(self.inverse)
        self.solve(self.weights if missing else None)
        self.walk(self.bands.v, self.states, self.written, initial=self.initial_state, final=final)

    @property
    def tiles(self) -> int:
        """Tiles of a state."""
        return -(-self.bands.value_width // self.own.scan.tile[1])


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
    call.bands.reading(v=call.written).forward_band(call.states, output)
    return output, final_state


def _backward(x: Recurrence, gradients: Gradients) -> dict[str, Tensor]:
    d_output, d_final_state = gradients.outputs
    needs_log_decay = x.log_decay is not None and "log_decay" in gradients.wanted
    d_final = None if d_final_state is None or not d_final_state.numel() else d_final_state.contiguous()
    call = DeltaLauncher(x, needs_log_decay, d_final=d_final is not None)
    bands = call.bands
    do = readable(torch.zeros_like(x.v) if d_output is None else d_output, bands.chunk)
    call.forward(weights=True)
    found = {} if call.initial_state is None else {"initial_state": torch.empty_like(call.initial_state)}
    ends = {"initial": d_final, "final": found.get("initial_state")}
    products = bands.new_products(call.tiles) if needs_log_decay else None
    if products is not None:
        ends |= {"entries": call.states, "products": products}
    d_states, solved = bands.new_states(bands.exits), torch.empty_like(call.written)
    call.walk(do, d_states, solved, reverse=True, **ends)

    rate = call.beta[..., None].float()
    written = bands.reading(v=call.written)
    predicting = bands.reading(-1.0, v=call.written, q=(rate * x.k).to(x.k.dtype))
    given = {"q": x.q, "k": x.k, "log_decay": x.log_decay if needs_log_decay or bands.totals is not None else None}
    own, more = ({name: y.new_empty(y.shape) for name, y in given.items() if y is not None} for _ in range(2))
    written.gradients(do, own, products, states=call.states, d_states=d_states)
    predicting.gradients(solved, more, None, strict=True, states=call.states, d_states=None)
    wide, dx = solved.float(), more["q"].float()
    found |= {"q": own["q"], "k": (own["k"].float() + more["k"]).addcmul_(rate, dx), "v": rate * wide}
    found["beta"] = torch.linalg.vecdot(wide, x.v.float()) + torch.linalg.vecdot(dx, x.k.float())
    if needs_log_decay:
        found["log_decay"] = own["log_decay"].add_(more["log_decay"])
    return found


CHUNKWISE = Op("delta_chunkwise_triton", Recurrence, fake=_allocate, forward=_forward, backward=_backward, outputs=2)


def delta_chunkwise_triton(x: Recurrence) -> RecurrenceOutput:
    """The chunkwise paradigm on a GPU.

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
