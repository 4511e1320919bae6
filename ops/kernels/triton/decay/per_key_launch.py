"""How the decay family's chunkwise op is launched where every key dimension decays by itself (GLA, HGRN2).

Notation of ops/decay/chunkwise.py, whose equations these are. What decays from or to the ends of a chunk is formed
first; with it the scan is that of op.py, without decays of tokens:

    key_decay       scale (q * p), k * s, g, and the clocks; of the delta rule also k * p
    key_pairs       A of each chunk; of the delta rule also (k k^T) * D
    key_band        o = scale (q * p) S + A v, and dv = (k * s) dS' + A^T do
    key_backward    dq, dk and da: what went through the states, and through A by way of the middles of blocks

Backward forms the first two again. This module needs no triton: it is imported where a kernel is launched.
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
"""Tokens of a chunk at most."""


def launcher_of(x: Recurrence, needs_log_decay: bool = False, *, d_final: bool = False) -> Launcher:
    """What launches the bodies for decays such as a call's, backwards with or without gradients of final states."""
    if x.log_decay is not None and x.log_decay.ndim == 4:
        return KeyLauncher(x, d_final=d_final)
    return Launcher(x, needs_log_decay, d_final=d_final)


class KeyLauncher(Launcher):
    """One call of the op: the operands that have decayed, the scan, and the bodies of its own."""

    def __init__(self, x: Recurrence, *, d_final: bool = False) -> None:
        assert x.log_decay is not None
        # what the scan reads has been scaled and has decayed
        super().__init__(x._replace(log_decay=None, scale=1.0), d_final=d_final)
        assert self.configuration.keys is not None
        self.launch, predicts = self.configuration.keys, x.beta is not None
        per_key = (*x.v.shape[:3], self.key_width)
        self.queries, self.keys = (self.q.new_empty(per_key) for _ in range(2))
        self.reads = self.q.new_empty(per_key) if predicts else None
        self.totals = x.log_decay.new_empty(self.chunks, self.heads, self.key_width)
        clocks = x.log_decay.new_empty(2 if x.q.dtype == torch.float32 else 1, *per_key)
        self.own = {"clocks": clocks, "scale": x.scale, "plane": self.common["plane"]}
        self.own |= {"shared": self.shared, "q": self.q, "k": self.k, **strides(q=self.q, k=self.k)}
        found = {"queries": self.queries, "keys": self.keys, "reads": self.reads, "totals": self.totals}
        self._run("key_decay", self.launch, self.key_width, log_decay=x.log_decay.contiguous(), **found, **self.own)
        self.own["LEVELS"] = self.chunk.bit_length() - 1
        self.scores = self._pairs(self.q.dtype)
        # the rows of an inverse add up roundings of many pairs
        self.pairs = self.reading(1.0, q=self.k)._pairs(torch.float32) if predicts else None

    def reading(self, scale: float | None = None, **operands: Tensor) -> "KeyLauncher":
        other, given = copy(self), {} if scale is None else {"scale": scale}
        other.v = operands.pop("v", self.v)
        other.own = {**self.own, **operands, **strides(**operands), **given}
        return other

    def _pairs(self, dtype: torch.dtype) -> Tensor:
        """What queries have of keys inside chunks: [chunks H C C]."""
        scores = self.q.new_empty(self.chunks, self.heads, self.chunk, self.chunk, dtype=dtype)
        self._run("key_pairs", self.launch, 1, scores=scores, **self.own)
        return scores

    def _run(self, name: str, launch: Launch, width: int, **arguments: Any) -> None:
        """Launch a body for every tile of so many columns, chunk and head."""
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
        """Fill `output`."""
        self._band(self.queries, self.v, states, output)

    def _band(self, x: Tensor, z: Tensor, states: Tensor, out: Tensor, *, reverse: bool = False) -> None:
        launch, given = self.configuration.forward, {"x": x, "z": z, "scores": self.scores, "states": states}
        given |= {"out": out, "V": self.value_width, "REVERSE": reverse}
        self._run("key_band", launch, self.value_width, **given, **strides(z=z))

    def new_products(self, tiles: int) -> Tensor | None:
        """None: one body finds the gradient of the log-decays, wanted or not."""

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
        given = {"v": self.v, "do": do, **states, "totals": self.totals, "V": self.value_width, "STRICT": strict}
        found = {"dq": out["q"], "dk": out["k"], "d_log_decay": out["log_decay"], **strides(v=self.v, do=do)}
        self._run("key_backward", self.launch, self.key_width, **given, **found, **self.own)
