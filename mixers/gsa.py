"""Gated slot attention, GSA (Zhang et al., arXiv 2409.07146).

    q, k, v = silu(x W_Q), silu(x W_K), silu(x W_V) by head
    f_t     = sigmoid(x_t W_f)^(1/tau)                  one forget gate per slot m of a head's M slots
    K_t     = diag(f_t) K_{t-1} + (1 - f_t) k_t^T       a key per slot,   [M K]
    V_t     = diag(f_t) V_{t-1} + (1 - f_t) v_t^T       a value per slot, [M V]
    o_t     = softmax(K_t q_t) V_t                      over the slots
    y       = RMSNorm(silu(o)) W_O                      the norm is over all heads, with weights

Both are the decay op with slots as keys. Queries read V along the slots, and K along its values, which are the keys k.
As in the authors' code, scores have no factor 1/sqrt(K), and there are as many slots as a head has key dimensions. One
difference from that code: with a short convolution, its silu takes the place of the one above, and is not applied
before it.
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from ..ops.decay import decay, decay_reading_values
from ..ops.runtime.kernel import Probe
from ..ops.runtime.paradigm import Paradigm
from .base.layer_call import Mixed
from .parts import QKV, Call, QKVConfig, QKVMixer, RecurrenceOutput, head_width
from .parts.gates import gate_decay
from .parts.qkv import Affine, OutputGate


class GSAConfig(QKVConfig):
    """Gated slot attention: softmax attention over a fixed number of slots, whose keys and values decay."""

    kind: Literal["gsa"] = "gsa"
    n_slots: int | None = Field(default=None, gt=0, le=2**16, examples=[3])
    """Number of slots per head; the width of a head's keys when null."""
    gate_logit_normalizer: float = Field(default=8.0, ge=1e-3, le=1e6, examples=[1.0])
    """Exponent tau of the forget gates: larger values give a longer memory."""
    gate: OutputGate = "none"
    norm_affine: Affine = True
    norm_eps: float = Field(default=1e-5, ge=0)
    """Constant added to the mean square in the output norm."""
    chunk_size: int = Field(default=64, gt=0, le=2**20)
    """Chunk length in tokens; changes the cost, never the result."""

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "GSA":
        return GSA(self, d_model)


class GSAState(NamedTuple):
    """State of gated slot attention after a prefix: a key and a value per slot."""

    keys: Float[Tensor, "B H M K"]
    """Keys of the slots, float32 or float64."""
    memory: Float[Tensor, "B H M V"]
    """Values of the slots, float32 or float64."""
    recent: Float[Tensor, "B W-1 C"]
    """Last inputs of the short convolution, oldest first; empty without a short convolution."""
    position: Int[Tensor, " B"]
    """Number of tokens processed."""


class GSA(QKVMixer):
    """Layer configured by `GSAConfig`."""

    log_decay_shape = "B T H K"
    silu_without_conv = True

    def __init__(self, config: GSAConfig, d_model: int) -> None:
        self.n_slots = config.n_slots or head_width(d_model, config.expand_k, config.n_heads, "expand_k")
        super().__init__(config, d_model, forget=config.n_heads * self.n_slots)
        self.norm = self.output_norm(self.n_heads * self.value_dim)

    def mix(  # pyright: ignore[reportIncompatibleMethodOverride] another state type
        self, x: Float[Tensor, "B T D"], call: Call
    ) -> Mixed[GSAState]:
        h = self.project(x, call)
        log_forget = gate_decay(h.more["forget"].unflatten(-1, (self.n_heads, -1)), self.config.gate_logit_normalizer)
        writes = -log_forget.expm1()
        scores, keys = decay_reading_values(h.q, writes.to(h.k.dtype), h.k, log_forget, call.enter("keys"), scale=1.0)
        extras = {"scores": scores, "writes": writes, "log_forget": log_forget}
        o, memory = self.recur(x, h._replace(more=extras), call.enter("memory"))
        y, after = self.project_out(x, h, o, memory, call)
        state = None if after is None or keys is None else GSAState(keys, *after)
        return self.with_own_values(y, state, h.own_values)

    def recur(self, x: Tensor, h: QKV, call: Call) -> RecurrenceOutput:
        writes = h.more["writes"]
        reads = h.more["scores"].to(writes.dtype).softmax(-1)
        return decay(reads.to(h.v.dtype), writes.to(h.v.dtype), h.v, h.more["log_forget"], call, scale=1.0)

    def gated_norm(self, o: Float[Tensor, "B T H V"], gate: Float[Tensor, "B T H V"] | None) -> Tensor:
        # one norm over all heads
        gate = None if gate is None else gate.flatten(2)
        return self.norm(F.silu(o).flatten(2), gate).unflatten(2, (self.n_heads, -1))

    def init_state(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, batch_size: int, *, max_length: int | None = None
    ) -> GSAState:
        state = super().init_state(batch_size)
        slots = batch_size, self.n_heads, self.n_slots
        keys, memory = (state.memory.new_zeros(*slots, width) for width in (self.key_dim, self.value_dim))
        return GSAState(keys, memory, state.recent, state.position)

    def flops(self, length: int, paradigm: Paradigm, context: int = 0) -> int:
        options = {"chunk_size": self.chunk_size, "context": context}
        weights = self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.outside_flops // 2
        if paradigm is Paradigm.CHUNKWISE:
            keys = self.family.flops(paradigm, length, self.n_slots, self.key_dim, key_decays=True, **options)
        else:  # one head per slot
            keys = self.n_slots * self.family.flops(paradigm, length, self.key_dim, 1, **options)
        values = self.family.flops(paradigm, length, self.n_slots, self.value_dim, key_decays=True, **options)
        return 2 * length * weights + self.n_heads * (keys + values)

    def kernels(self, dtype: torch.dtype) -> tuple[str, Probe]:
        name, probe = super().kernels(dtype)
        return name, replace(probe, key_width=self.n_slots)
