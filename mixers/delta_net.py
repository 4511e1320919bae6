"""DeltaNet (Yang et al., arXiv 2406.06484; its delta rule as a layer is Schlag et al.'s, arXiv 2102.11174).

    q, k, v = silu(conv(x W_Q)), silu(conv(x W_K)), silu(conv(x W_V)) by head;  q and k divided by their norms
    beta_t = sigmoid(x_t W_b)   one scalar per head, from 0 to 1 (to 2 with allow_neg_eigval)
    S_t = S_{t-1} + beta_t k_t (v_t - k_t^T S_{t-1})^T         o_t = q_t S_t / sqrt(K)
    y   = RMSNorm(o) W_O                    the norm is per head, its weights are shared by all heads

The value that the state stores at k_t is replaced by v_t, in the proportion beta_t; linear attention adds instead. With
beta up to 2, a direction of the state may change its sign (Grazzi et al., arXiv 2411.12537). Like the authors' code,
and unlike the paper, there is a factor 1/sqrt(K), which the norm cancels except for its eps. The output gate of the
authors' code is available and off by default.

`update` solves dS/dt = k_t (v_t - k_t^T S)^T over the time beta_t. `euler` takes one explicit step, as above. The
others leave q and k as they are, and have beta'_t in place of beta_t, so that keys of any length are stable. With
l_t = k_t . k_t + 1e-6, where the papers add nothing:

    exact      beta'_t = (1 - exp(-beta_t l_t)) / l_t        the solution (EFLA, arXiv 2512.12602)
    implicit   beta'_t = beta_t / (1 + beta_t l_t)           an implicit step (Longhorn, arXiv 2407.14207)

Longhorn's own layer is around this step as Mamba's is, and its code keeps the diagonal of k k^T.
"""

from typing import Annotated, Literal, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from ..ops.delta import DELTA, delta
from .parts import QKV, Call, QKVConfig, QKVMixer, RecurrenceOutput, ShortConv, divisors
from .parts.qkv import Affine, OutputGate

DeltaChunk = Annotated[
    int,
    Field(
        gt=0,
        le=256,
        description="Chunk length in tokens; changes the cost, and the result only by rounding. The relative change in "
        "float32 is 2e-5 at 256, and would be 1e-4 at 2048.",
    ),
]


LENGTH_EPS = 1e-6
"""Constant added to the squared length of keys, so that zero keys have a finite inverse."""


class DeltaConfig(QKVConfig):
    """Fields of every mixer of the delta family."""

    family = DELTA
    short_conv: ShortConv = 4
    qk_norm: Literal["l2"] = "l2"  # pyright: ignore[reportIncompatibleVariableOverride] narrower type
    """Norm of queries and keys; always `l2`, because the state could grow without bound if keys were longer than 1."""
    allow_neg_eigval: bool = False
    """True to scale the write rate up to 2, so that eigenvalues of the state transition lie between -1 and 1."""
    norm_affine: Affine = True
    norm_eps: float = Field(default=1e-5, ge=0)
    """Constant added to the mean square in the output norm."""
    chunk_size: DeltaChunk = 64


class GroupedValuesConfig(DeltaConfig):
    """Fields of mixers in which several value heads may share queries and keys (Qwen3-Next)."""

    n_qk_heads: int | None = Field(default=None, gt=0, examples=[1])
    """Number of query and key heads, each shared by n_heads / n_qk_heads value heads; n_heads when null."""

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.n_qk_heads is not None and self.n_heads % self.n_qk_heads:
            raise ValueError(
                f"n_qk_heads must divide n_heads = {self.n_heads}, got {self.n_qk_heads}: "
                f"choose one of {divisors(self.n_heads)}"
            )
        return self


class PreconditionedConfig(GroupedValuesConfig):
    """Fields of mixers with a decay whose keys that write may be preconditioned."""

    precondition: float | None = Field(default=None, ge=1, le=2, examples=[1.5])
    """Bound x of the factors of keys that write, from 1/x to x: small where much was written (preconditioned delta
    rules; the authors use 1.5); null for none."""

    @model_validator(mode="after")
    def _check_precondition(self) -> Self:
        if self.precondition is not None and self.allow_neg_eigval:
            raise ValueError(
                f"precondition = {self.precondition:g} needs allow_neg_eigval = false, got true: "
                "with both, eigenvalues of the state transition could lie below -1"
            )
        if self.precondition is not None and self.rotation != "none":
            raise ValueError(
                f"precondition = {self.precondition:g} needs rotation = none, got {self.rotation}: squares of rotated "
                "keys would depend on absolute positions"
            )
        return self


class DeltaNetConfig(DeltaConfig):
    """DeltaNet: a matrix state per head, in which each token replaces the value of its key."""

    kind: Literal["delta_net"] = "delta_net"
    gate: OutputGate = "none"
    update: Literal["euler", "exact", "implicit"] = "euler"
    """Step of the state: `euler` is DeltaNet's, with queries and keys of norm 1; `exact` (EFLA) and `implicit`
    (Longhorn) leave queries and keys as they are, and are stable for keys of any length."""

    @model_validator(mode="after")
    def _check_eigenvalues(self) -> Self:
        if self.allow_neg_eigval and self.update != "euler":
            raise ValueError(
                f"allow_neg_eigval needs update = euler, got {self.update}, whose eigenvalues are never negative"
            )
        return self

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> "DeltaNet":
        return DeltaNet(self, d_model)


class DeltaNet(QKVMixer):
    """Layer configured by `DeltaNetConfig`."""

    silu_without_conv = True

    def __init__(self, config: DeltaNetConfig, d_model: int) -> None:
        super().__init__(config, d_model, beta=config.n_heads)

    def recur(self, x: Tensor, h: QKV, call: Call) -> RecurrenceOutput:
        beta = write_rate(h.more["beta"], self.state_dtype, neg_eigval=self.config.allow_neg_eigval)
        if self.config.update == "euler":
            return delta(h.q, h.k, h.v, beta, None, call)
        # the same step with keys of norm 1 and values divided by |k|: nothing in a chunk grows with the keys
        square = h.k.to(beta.dtype).square().sum(-1) + LENGTH_EPS
        rate = beta * square
        beta = -torch.expm1(-rate) if self.config.update == "exact" else rate / (1 + rate)
        inverse = square.rsqrt()[..., None]
        return delta(h.q, (h.k * inverse).to(h.k.dtype), (h.v * inverse).to(h.v.dtype), beta, None, call)

    def features(self, qk: Float[Tensor, "B T 2H K"]) -> Float[Tensor, "B T 2H K"]:
        """Norm queries and keys, unless `update` leaves them as they are."""
        return super().features(qk) if self.config.update == "euler" else qk


def write_rate(logits: Float[Tensor, "B T H"], dtype: torch.dtype, *, neg_eigval: bool) -> Float[Tensor, "B T H"]:
    """Return the write rate beta_t = sigmoid(logits), doubled if `neg_eigval` allows negative eigenvalues."""
    beta = logits.to(dtype).sigmoid()
    return 2 * beta if neg_eigval else beta
