"""The delta rule's chunkwise op in Triton.

    S_t = P_t + b_t k_t (v_t - k_t^T P_t)^T,  P_t = diag(exp(g_t)) S_{t-1}    o_t = scale q_t S_t

Notation of ops/delta. The equations inside a chunk are those of ops/delta/chunkwise.py (UT transform of arXiv
2406.06484, decays of arXiv 2412.06464 and 2510.26692). The written values U are computed first. With U in place of v,
the rest is the decay family's recurrence, and its bands compute it:

    solve        T of each chunk, and for the backward pass A
    delta_scan   goes through the chunks with the state in registers, and stores each chunk's entry state and U;
                 backwards, from do, the gradient of each chunk's exit state and z = T^T dU
    bands        forward    o from U
                 backward   dq, dk  from do and U, as in the decay family
                            dx, dk  from z and U, for the predictions: queries x = b k with scale -1 that see only
                                    earlier keys

The forward pass saves nothing; the backward pass computes T, the states and U again. Then

    dv = b z        dk = dk of both bands + b dx        db = <z, v> + <k, dx>        dg = dg of both bands

With decays per key dimension, the bands are those of ../decay/per_key_launch.py. It computes decayed operands and all
pairs first, so that scans need only the decays of whole chunks.

Tensors stored between the functions have the inputs' dtype, T and A too; sums and the states carried by a scan are
float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ....recurrence.family import Recurrence, RecurrenceOutput
from ....runtime.custom_op import Gradients, Op
from ....runtime.kernel import Kernel, Probe, declare
from ....runtime.paradigm import Paradigm
from ..decay.launch import width_limits
from ..decay.per_key_launch import launcher_of
from ..launch import (
    UNIT,
    Launch,
    addressable,
    contiguous,
    is_interpreted,
    kernels,
    missing_requirements,
    run_padded,
    strides,
)

MAX_FLOAT32_KEY_WIDTH = 64
"""Largest width of float32 keys: float32 products use no tensor cores, and wider ones spill registers."""
MAX_DECAYED_KEY_WIDTH = 128
"""Largest width of keys with a decay per dimension: a scan holds two forms of them in a block's shared memory."""


def limits(probe: Probe) -> list[str]:
    """Return the reasons, apart from the dtype, why the kernel cannot run a call; empty if it can."""
    reasons = missing_requirements(probe)
    if probe.dtype == torch.float32 and probe.key_width > MAX_FLOAT32_KEY_WIDTH:
        reasons.append(f"float32 keys must be at most {MAX_FLOAT32_KEY_WIDTH} wide, got {probe.key_width}")
    elif probe.log_decay == "B T H K" and probe.key_width > MAX_DECAYED_KEY_WIDTH:
        reasons.append(
            f"keys with a decay per dimension must be at most {MAX_DECAYED_KEY_WIDTH} wide, got {probe.key_width}"
        )
    return reasons + width_limits(probe)


class Configuration(NamedTuple):
    """Launch configurations of the delta rule's own functions; a tile of the scans spans the whole key width."""

    solve: Launch
    """Computation of the inverse T of each chunk."""
    scan: Launch
    """Scan over chunks in the forward pass."""
    reverse: Launch
    """Scan over chunks in the backward pass, from the last to the first."""


def configuration(bits: int, key_width: int) -> Configuration:
    """Return the configuration for elements of `bits` bits; the bands have the decay family's configurations."""
    width = max(UNIT, 1 << (key_width - 1).bit_length())
    if is_interpreted():
        small = Launch((width, 32), 1, 1)
        return Configuration(small, small, small)
    scan = Launch((width, 32), 4 if bits == 16 else 8, 2)
    return Configuration(Launch((32, 0), 4, 2), scan, scan._replace(warps=8) if width > 128 else scan)


class DeltaLauncher:
    """Launches of one call of the op: the delta rule's two functions, and the decay family's launcher as `bands`."""

    def __init__(self, x: Recurrence, needs_log_decay: bool = False, *, d_final: bool = False) -> None:
        """Prepare the launches of a call; the arguments are those of the decay family's `Launcher`."""
        assert x.beta is not None
        # chunks of at most 64 tokens, because `solve` computes the rows of T one after another
        self.bands = bands = launcher_of(x._replace(chunk_size=min(x.chunk_size, 64)), needs_log_decay, d_final=d_final)
        if bands.decays["clocks"] is not None and bands.backward.tile[1] > 64:  # larger steps spill registers
            bands.backward = bands.backward._replace(tile=(32, bands.backward.tile[1]))
        self.configuration = configuration(8 * x.q.element_size(), bands.key_width)
        self.beta, self.initial_state = x.beta.contiguous(), contiguous(x.initial_state)
        self.states, self.written = bands.new_states(bands.entries), x.q.new_empty(x.v.shape)
        self.inverse = x.q.new_empty(bands.chunks, bands.heads, bands.chunk, bands.chunk)
        self.weights = bands.scores

    def solve(self, weights: Tensor | None) -> None:
        """Compute T and write it to `inverse`; unless `weights` is None, compute A and write it there."""
        bands, launch = self.bands, self.configuration.solve
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

    def scan(self, v: Tensor, states: Tensor, written: Tensor, *, reverse: bool = False, **ends: Tensor | None) -> None:
        """Scan over chunks, and fill `states` and `written`; in reverse, `v` is the gradient of the output.

        `ends` are those of `Launcher.scan`.
        """
        bands = self.bands
        launch = self.configuration.reverse if reverse else self.configuration.scan
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
        """Fill `states` with the entry states of chunks and `written` with U; compute A if `weights` is True."""
        needs_weights = weights and self.weights is None
        if needs_weights:
            self.weights = torch.empty_like(self.inverse)
        self.solve(self.weights if needs_weights else None)
        self.scan(self.bands.v, self.states, self.written, initial=self.initial_state, final=final)

    @property
    def tiles(self) -> int:
        """Number of tiles that the scan divides a state into."""
        return -(-self.bands.value_width // self.configuration.scan.tile[1])


def _allocate(x: Recurrence) -> tuple[Tensor, Tensor]:
    # checked inside the op, which a compiler does not trace
    KERNEL.require(x.probe())
    shape = (x.rows, *x.state_shape) if x.output_final_state else 0
    return x.q.new_empty(x.v.shape), x.q.new_empty(shape, dtype=torch.float32)


def _forward(x: Recurrence) -> tuple[Tensor, Tensor]:
    output, final_state = _allocate(x)
    call = DeltaLauncher(x)
    call.forward(final_state if x.output_final_state else None)
    call.bands.with_operands(v=call.written).forward_band(call.states, output)
    return output, final_state


def _backward(x: Recurrence, gradients: Gradients) -> dict[str, Tensor]:
    d_output, d_final_state = gradients.outputs
    needs_log_decay = x.log_decay is not None and "log_decay" in gradients.wanted
    d_final = None if d_final_state is None or not d_final_state.numel() else d_final_state.contiguous()
    call = DeltaLauncher(x, needs_log_decay, d_final=d_final is not None)
    bands = call.bands
    do = addressable(torch.zeros_like(x.v) if d_output is None else d_output, bands.chunk)
    call.forward(weights=True)
    out = {} if call.initial_state is None else {"initial_state": torch.empty_like(call.initial_state)}
    ends = {"initial": d_final, "final": out.get("initial_state")}
    products = bands.new_products(call.tiles) if needs_log_decay else None
    if products is not None:
        ends |= {"entries": call.states, "products": products}
    d_states, z = bands.new_states(bands.exits), torch.empty_like(call.written)
    call.scan(do, d_states, z, reverse=True, **ends)

    beta = call.beta[..., None].float()
    outputs = bands.with_operands(v=call.written)
    predictions = bands.with_operands(-1.0, v=call.written, q=(beta * x.k).to(x.k.dtype))
    inputs = {"q": x.q, "k": x.k, "log_decay": x.log_decay if needs_log_decay or bands.totals is not None else None}
    through_outputs, through_predictions = (
        {name: y.new_empty(y.shape) for name, y in inputs.items() if y is not None} for _ in range(2)
    )
    outputs.gradients(do, through_outputs, products, states=call.states, d_states=d_states)
    predictions.gradients(z, through_predictions, None, strict=True, states=call.states, d_states=None)
    wide_z, dx = z.float(), through_predictions["q"].float()
    dk = through_outputs["k"].float() + through_predictions["k"]
    out |= {"q": through_outputs["q"], "k": dk.addcmul_(beta, dx), "v": beta * wide_z}
    out["beta"] = torch.linalg.vecdot(wide_z, x.v.float()) + torch.linalg.vecdot(dx, x.k.float())
    if needs_log_decay:
        out["log_decay"] = through_outputs["log_decay"].add_(through_predictions["log_decay"])
    return out


CHUNKWISE = Op("delta_chunkwise_triton", Recurrence, fake=_allocate, forward=_forward, backward=_backward, outputs=2)


def delta_chunkwise_triton(x: Recurrence) -> RecurrenceOutput:
    """Compute the chunkwise paradigm on a GPU.

    Chunks have at most 64 tokens, or 32 if inputs are float32.

    Raises:
        SeqmixError: `KERNEL` does not support the call.
    """
    return run_padded(CHUNKWISE, x)


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
