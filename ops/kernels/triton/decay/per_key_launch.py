"""Launch code of the decay family's chunkwise op with one decay per key dimension (GLA, HGRN2).

Notation and equations of ops/decay/chunkwise.py. Queries and keys are first multiplied by their decays from the start
or to the end of their chunk; with these, the scan is that of op.py without decays per token:

    key_decay       scale (q * p), k * s, g, and the clocks; for the delta rule also k * p
    key_pairs       A of each chunk; for the delta rule also (k k^T) * D
    key_band        o = scale (q * p) S + A v, and dv = (k * s) dS' + A^T do
    key_backward    dq, dk and da, through the states and through A

The backward pass computes the first two again. This module does not import triton; `kernels` does, when a kernel is
launched.
"""

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ....recurrence.family import Recurrence
from ..launch import Launch, kernels, strides
from .launch import Launcher

MAX_KEY_CHUNK = 64
"""Maximum number of tokens in a chunk with decays per key dimension."""


def launcher_of(x: Recurrence, needs_log_decay: bool = False, *, d_final: bool = False) -> Launcher:
    """Return the launcher for the decays of a call; the arguments are those of `Launcher`."""
    if x.log_decay is not None and x.log_decay.ndim == 4:
        return KeyLauncher(x, d_final=d_final)
    return Launcher(x, needs_log_decay, d_final=d_final)


class KeyLauncher(Launcher):
    """Launches of one call of the op with decays per key dimension.

    Its scans are those of `Launcher`, with operands that already include their decays.
    """

    def __init__(self, x: Recurrence, *, d_final: bool = False) -> None:
        """Prepare the launches of a call, and compute the decayed operands and A; arguments as for `Launcher`."""
        assert x.log_decay is not None
        # the scan's operands already include scale and decays
        super().__init__(x._replace(log_decay=None, scale=1.0), d_final=d_final)
        assert self.configuration.keys is not None
        self.launch = self.configuration.keys
        is_delta_rule = x.beta is not None
        per_key = (*x.v.shape[:3], self.key_width)
        self.queries, self.keys = (self.q.new_empty(per_key) for _ in range(2))
        self.reads = self.q.new_empty(per_key) if is_delta_rule else None
        self.totals = x.log_decay.new_empty(self.chunks, self.heads, self.key_width)
        self.key_arguments = {
            "clocks": x.log_decay.new_empty(2 if x.q.dtype == torch.float32 else 1, *per_key),
            "scale": x.scale,
            "plane": self.common["plane"],
            "shared": self.shared,
            "q": self.q,
            "k": self.k,
            **strides(q=self.q, k=self.k),
        }
        self._run(
            "key_decay",
            self.launch,
            self.key_width,
            log_decay=x.log_decay.contiguous(),
            queries=self.queries,
            keys=self.keys,
            reads=self.reads,
            totals=self.totals,
            **self.key_arguments,
        )
        self.key_arguments["LEVELS"] = self.chunk.bit_length() - 1
        self.scores = self._compute_pairs(self.q.dtype)
        # float32, because rows of the inverse add up the rounding errors of many pairs
        self.pairs = self.with_operands(1.0, q=self.k)._compute_pairs(torch.float32) if is_delta_rule else None

    def with_operands(self, scale: float | None = None, **operands: Tensor) -> "KeyLauncher":
        other = copy(self)
        changed_scale = {} if scale is None else {"scale": scale}
        other.v = operands.pop("v", self.v)
        other.key_arguments = {**self.key_arguments, **operands, **strides(**operands), **changed_scale}
        return other

    def _compute_pairs(self, dtype: torch.dtype) -> Tensor:
        """Compute A, the scores scale q k^T inside chunks with their decays: [chunks H C C]."""
        scores = self.q.new_empty(self.chunks, self.heads, self.chunk, self.chunk, dtype=dtype)
        self._run("key_pairs", self.launch, 1, scores=scores, **self.key_arguments)
        return scores

    def _run(self, name: str, launch: Launch, width: int, **arguments: Any) -> None:
        """Launch a jitted function once per tile of `width` columns, chunk and head."""
        tiles = -(-width // launch.tile[1])
        sizes = {size: self.common[size] for size in ("length", "heads", "chunks_a_row", "K", "C")}
        getattr(kernels("decay", "per_key_bodies"), name)[(tiles * self.chunks * self.heads,)](
            table=self.table,
            chunks=self.chunks,
            TILE_INNER=launch.tile[0],
            TILE_OUTER=launch.tile[1],
            **sizes,
            **arguments,
            **launch.options,
        )

    def forward_band(self, states: Tensor, output: Tensor) -> None:
        """Compute the output from the chunks' entry states, and write it to `output`."""
        self._band(self.queries, self.v, states, output)

    def _band(self, x: Tensor, z: Tensor, states: Tensor, out: Tensor, *, reverse: bool = False) -> None:
        """Compute out = x S + A z, in reverse with A^T."""
        self._run(
            "key_band",
            self.configuration.forward,
            self.value_width,
            x=x,
            z=z,
            scores=self.scores,
            states=states,
            out=out,
            V=self.value_width,
            REVERSE=reverse,
            **strides(z=z),
        )

    def new_products(self, tiles: int) -> Tensor | None:
        """Return None: `key_backward` computes the gradient of log-decays without the scan's products."""

    def gradients(
        self,
        do: Tensor,
        out: Mapping[str, Tensor],
        products: Tensor | None,
        *,
        strict: bool = False,
        **states: Tensor | None,
    ) -> None:
        del products
        d_states = states["d_states"]
        if "v" in out and d_states is not None:
            self._band(self.keys, do, d_states, out["v"], reverse=True)
        self._run(
            "key_backward",
            self.launch,
            self.key_width,
            v=self.v,
            do=do,
            **states,
            totals=self.totals,
            V=self.value_width,
            STRICT=strict,
            dq=out["q"],
            dk=out["k"],
            d_log_decay=out["log_decay"],
            **strides(v=self.v, do=do),
            **self.key_arguments,
        )
