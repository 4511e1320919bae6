"""How the decay family's chunkwise op is launched where every key dimension decays by itself (GLA, HGRN2).

Notation of chunkwise.py, whose equations these are. What decays from or to the ends of a chunk is formed first; with it
the scan is that of triton.py, without decays of tokens:

    key_decay       scale (q * p), k * s, g, and the clocks
    key_pairs       A of each chunk
    key_band        o = scale (q * p) S + A v, and dv = (k * s) dS' + A^T do
    key_backward    dq, dk and da: what went through the states, and through A by way of the middles of blocks

Backward forms the first two again. This module needs no triton: it is imported where a kernel is launched.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..recurrence import Recurrence
from ..triton_launch import Launch, kernels, strides
from .triton_launch import Launcher

MAX_KEY_CHUNK = 64
"""Tokens of a chunk at most."""


class KeyLauncher(Launcher):
    """One call of the op: the operands that have decayed, the scan, and the bodies of its own."""

    def __init__(self, x: Recurrence) -> None:
        assert x.log_decay is not None
        # what the scan reads has been scaled and has decayed
        super().__init__(x._replace(log_decay=None, scale=1.0))
        assert self.configuration.keys is not None
        self.launch = self.configuration.keys
        self.queries, self.keys = (self.q.new_empty(x.q.shape) for _ in range(2))
        self.totals = x.log_decay.new_empty(self.chunks, self.heads, self.key_width)
        self.scores = self.q.new_empty(self.chunks, self.heads, self.chunk, self.chunk)
        clocks = x.log_decay.new_empty(2 if x.q.dtype == torch.float32 else 1, *x.q.shape)
        self.own = {"clocks": clocks, "scale": x.scale, "plane": self.common["plane"]}
        self.own |= {"q": self.q, "k": self.k, **strides(q=self.q, k=self.k)}
        found = {"queries": self.queries, "keys": self.keys, "totals": self.totals}
        self._run("key_decay", self.launch, self.key_width, log_decay=x.log_decay.contiguous(), **found, **self.own)
        self.own["LEVELS"] = self.chunk.bit_length() - 1
        self._run("key_pairs", self.launch, 1, scores=self.scores, **self.own)

    def _run(self, name: str, launch: Launch, width: int, **arguments: Any) -> None:
        """Launch a body for every tile of so many columns, chunk and head."""
        tiles = -(-width // launch.tile[1])
        sizes = {size: self.common[size] for size in ("length", "heads", "chunks_a_row", "K", "C")}
        getattr(kernels("decay", "triton_key_kernels"), name)[(tiles * self.chunks * self.heads,)](
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

    def backward_keys(self, do: Tensor, out: Mapping[str, Tensor], states: Tensor, d_states: Tensor) -> None:
        """Fill the gradients of q, k, v and log_decay."""
        self._band(self.keys, do, d_states, out["v"], reverse=True)
        given = {"v": self.v, "do": do, "states": states, "d_states": d_states, "totals": self.totals}
        found = {"dq": out["q"], "dk": out["k"], "d_log_decay": out["log_decay"], "V": self.value_width}
        given |= strides(v=self.v, do=do)
        self._run("key_backward", self.launch, self.key_width, **given, **found, **self.own)
