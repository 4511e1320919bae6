"""How the Triton kernels of the decay family are launched: tables of configurations, and one call of the bodies.

The notation and what each body computes stand in op.py. This module needs no triton: it is imported where a kernel
is launched.
"""

from collections.abc import Mapping
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ....recurrence.family import Recurrence
from ....recurrence.groups import capacity
from ....runtime.kernel import Probe
from ..launch import FUSED, Launch, chunk_table, interpreted, kernels, readable, strides

MAX_KEY_WIDTH, MAX_VALUE_WIDTH = 256, 512
"""The paper's head."""


def too_wide(probe: Probe) -> list[str]:
    """Whether heads are wider than that."""
    if probe.key_width <= MAX_KEY_WIDTH and probe.value_width <= MAX_VALUE_WIDTH:
        return []
    widths = f"keys are up to {MAX_KEY_WIDTH} wide and values up to {MAX_VALUE_WIDTH}"
    return [f"{widths}, not {probe.key_width} and {probe.value_width}"]


class Configuration(NamedTuple):
    """How the chunkwise bodies run for one kind of input."""

    chunk: int
    """C, tokens."""
    scan: Launch
    token_scan: Launch
    """The scan where decays are given for each token: clocks take registers."""
    forward: Launch
    backward: Launch
    decay_backward: Launch
    """The backward band where decays are given for each token, or a log-decay has a gradient: clocks and the sums that
    the gradient needs take registers."""
    keys: Launch | None = None
    """What each key dimension decays by itself; its tile is a step of values and a tile of keys."""
    precision: str = "ieee"
    """Of products of float32: `ieee`, or `tf32x3`, three of TF32 on tensor cores."""


def configurations(bits: int, key_width: int, value_width: int, *, tf32x3: bool = False) -> tuple[Configuration, ...]:
    """The table for GPUs, the largest chunk first, for elements of so many bits.

    What memory bounds, a scan and everything of narrow heads, wants several blocks: one computes while others wait.
    """
    if bits == 32 and tf32x3:
        scan = Launch((64, 64), 8, 2)
        forward, backward = (Launch((32, 64 if width <= 64 else 128), 8, 2) for width in (value_width, key_width))
        return (Configuration(64, scan, scan, forward, backward, backward, precision="tf32x3"),)
    if bits == 32:
        scan, forward, backward = Launch((64, 64), 8, 3), Launch((32, 64), 8, 2), Launch((32, 32), 4, 2, blocks=2)
        return (Configuration(32, scan, scan, forward, backward, backward, Launch((32, 32), 8, 2)),)
    if max(key_width, value_width) <= 64:
        four, three = Launch((64, 64), 4, 3, blocks=4), Launch((64, 64), 4, 3, blocks=3)
        return (Configuration(64, four, three, four, four, three, Launch((64, 32), 8, 2)),)
    # a forward band has as many columns as a value
    columns = 64 if value_width <= 64 else 128
    scan = Launch((64, 64), 8, 3, blocks=2)
    large = Configuration(
        128,
        scan=scan,
        token_scan=scan._replace(stages=2),  # float16 spills with three
        forward=Launch((64, columns), 8, 3),
        backward=Launch((64, 128), 8, 3),
        decay_backward=Launch((64, 64), 8, 3),
    )
    four = Launch((64, 128), 4, 3, blocks=2)
    return large, Configuration(64, four, four, four._replace(tile=(64, columns)), four, four, Launch((64, 32), 8, 2))


_SMALL = Launch((16, 32), 1, 1)
INTERPRETED = tuple(Configuration(chunk, *[_SMALL] * 6, precision="ieee") for chunk in (32, 16))
"""The table for the interpreter: small, so that short inputs have several of everything."""

STEP = Launch((MAX_KEY_WIDTH, 32), 4, 1)
"""One token: the tile holds all keys."""


def choose(table: tuple[Configuration, ...], chunk_size: int) -> Configuration:
    """The largest chunk that is not larger than asked for, or else the smallest there is."""
    return next((found for found in table if found.chunk <= chunk_size), table[-1])


def configuration_of(x: Recurrence) -> Configuration:
    """The configuration that a call runs with, on its device."""
    if interpreted():
        return choose(INTERPRETED, x.chunk_size)
    table = configurations(8 * x.q.element_size(), x.q.shape[3], x.v.shape[3], tf32x3=x.tf32x3)
    if torch.cuda.get_device_capability(x.q.device) != (9, 0):
        # the large ones are known to fit Hopper, and the smallest fits what has less shared memory
        return table[-1]
    return choose(table, x.chunk_size)


class Launcher:
    """One call of the chunkwise op: what its bodies have in common, and how each is launched."""

    def __init__(self, x: Recurrence, needs_log_decay: bool = False, *, d_final: bool = False) -> None:
        log_decay, cu_seqlens = x.log_decay, x.cu_seqlens
        self.kernels = kernels("decay")
        self.configuration = configuration_of(x)
        self.chunk = self.configuration.chunk
        full = needs_log_decay or (log_decay is not None and log_decay.ndim == 3)
        self.backward = self.configuration.decay_backward if full else self.configuration.backward
        self.q, self.k, self.v = (readable(tensor, self.chunk) for tensor in (x.q, x.k, x.v))
        # of the scans
        self.queries, self.keys = self.q, self.k
        # where every key dimension decays by itself: the decays of chunks, [chunks H K], and A, [chunks H C C]; of the
        # delta rule also what predicts, [B T H K], and the pairs of keys, [chunks H C C]
        self.totals, self.scores, self.reads, self.pairs = None, None, None, None
        self.batch, self.length, self.heads, self.value_width = x.v.shape
        self.key_width, self.shared = x.q.shape[3], x.shared
        self.log_decay = None if log_decay is None else log_decay.contiguous()
        # its kernels take no stride of the boundaries, which may be a column
        self.boundaries = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.firsts, self.table = None, None
        if cu_seqlens is not None:
            edges = {"starts": x.initial_state is not None, "ends": d_final}
            self.firsts, self.table = chunk_table(cu_seqlens, self.length, self.chunk, **edges)
        self.rows = x.rows
        self.chunks = self.batch * capacity(self.length, self.chunk, cu_seqlens)
        # states that enter chunks, and gradients of those that leave them: where documents begin and end with zeros,
        # no more than there would be of one document
        self.entries, self.exits = (
            self.batch * capacity(self.length, self.chunk, cu_seqlens if given else None)
            for given in (x.initial_state is not None, d_final)
        )
        plane = self.batch * self.heads * self.length
        sizes = {"length": self.length, "heads": self.heads, "chunks_a_row": -(-self.length // self.chunk)}
        self.common = {**sizes, "plane": plane, "C": self.chunk}
        # decays fixed per head are rates; those given for each token become clocks
        given = log_decay is not None and log_decay.ndim == 3
        self.decays = {"rates": None if given else self.log_decay, "clocks": self._clocks() if given else None}
        self.common |= {**self.decays, "scale": x.scale, "K": self.key_width, "V": self.value_width}
        operands = {"q": self.q, "k": self.k, "v": self.v}
        self.in_bands = {**self.common, **operands, **strides(**operands), "table": self.table, "chunks": self.chunks}
        self.in_bands |= {"shared": self.shared, "PRECISION": self.configuration.precision}

    def _clocks(self) -> Tensor:
        """Of decays that are given for each token: [2 B H T]."""
        assert self.log_decay is not None
        clocks = self.log_decay.new_empty(2, self.batch, self.heads, self.length)
        self.kernels.clocks[(self.chunks * self.heads,)](
            log_decay=self.log_decay, clocks=clocks, table=self.table, chunks=self.chunks, **self.common, **FUSED
        )
        return clocks

    def reading(self, scale: float | None = None, **operands: Tensor) -> "Launcher":
        """The same bands of other queries, keys or values, and by another scale."""
        other = copy(self)
        given = {} if scale is None else {"scale": scale}
        other.in_bands = {**self.in_bands, **operands, **strides(**operands), **given}
        return other

    def new_states(self, number: int) -> Tensor:
        """Room for so many, as narrow as the inputs."""
        return self.q.new_empty(number, self.heads, self.key_width, self.value_width)

    @property
    def _scan(self) -> Launch:
        return self.configuration.scan if self.decays["clocks"] is None else self.configuration.token_scan

    @property
    def scan_tiles(self) -> int:
        """Tiles of a state as the scan has them."""
        tile_k, tile_v = self._scan.tile
        return -(-self.key_width // tile_k) * -(-self.value_width // tile_v)

    def scan(
        self, x: Tensor, w: Tensor, states: Tensor, ends: Mapping[str, Tensor | None], *, reverse: bool = False
    ) -> None:
        """Fill `states`, and of `ends` what is wanted: initial and final; products with the entries, given both."""
        launch = self._scan
        operands = {"x": x, "w": w}
        self.kernels.state_scan[(self.scan_tiles * self.rows * self.heads,)](
            states=states,
            **{name: ends.get(name) for name in ("initial", "final", "entries", "products")},
            totals=self.totals,
            boundaries=self.boundaries,
            firsts=self.firsts,
            table=self.table,
            shared=self.shared if self.queries is self.q else 1,
            PRECISION=self.configuration.precision,
            TILE_K=launch.tile[0],
            TILE_V=launch.tile[1],
            REVERSE=reverse,
            **operands,
            **strides(**operands),
            **self.common,
            **launch.options,
        )

    def forward_band(self, states: Tensor, output: Tensor) -> None:
        """Fill `output`."""
        launch = self.configuration.forward
        tiles = -(-self.value_width // launch.tile[1])
        self.kernels.band_forward[(tiles * self.chunks * self.heads,)](
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

    def new_products(self, tiles: int) -> Tensor | None:
        """Room for what a scan of so many tiles adds to the gradient of the log-decay, if it is its to find."""
        return self.q.new_empty(self.chunks, self.heads, tiles, dtype=torch.float32)

    def gradients(
        self,
        do: Tensor,
        out: Mapping[str, Tensor],
        products: Tensor | None,
        *,
        strict: bool = False,
        **states: Tensor | None,
    ) -> None:
        """Fill the gradients of q, k, and what else there is of v and log_decay, from `states` and `d_states`.

        Of the latter, and of products [chunks H tiles], there may be none. Where it is strict, queries see no keys of
        their own.
        """
        launch, sums = self.backward, None
        dv, log_decay = out.get("v"), out.get("log_decay")
        if log_decay is not None:
            sums = log_decay.new_empty(2, self.key_tiles, self.batch, self.heads, self.length)
        roles = 2 * self.key_tiles + (0 if dv is None else -(-self.value_width // launch.tile[1]))
        self.kernels.band_backward[(roles * self.chunks * self.heads,)](
            do=do,
            dq=out["q"],
            dk=out["k"],
            dv=dv,
            sums=sums,
            **states,
            TILE_INNER=launch.tile[0],
            TILE_OUTER=launch.tile[1],
            STRICT=strict,
            **self.in_bands,
            **strides(do=do),
            **launch.options,
        )
        if log_decay is not None:
            self._decay_gradient(do, sums, products, log_decay)

    def _decay_gradient(self, do: Tensor, sums: Tensor | None, products: Tensor | None, out: Tensor) -> None:
        launch = self.backward
        by_chunk = out if self.decays["rates"] is None else out.new_zeros(self.chunks, self.heads)
        self.kernels.decay_gradient[(self.chunks * self.heads,)](
            do=do,
            sums=sums,
            products=products,
            out=by_chunk,
            TILE_INNER=launch.tile[0],
            TILES=self.key_tiles,
            PRODUCTS=0 if products is None else products.shape[2],
            **self.in_bands,
            **strides(do=do),
            **launch.options,
        )
        if self.decays["rates"] is not None:
            out.copy_(by_chunk.sum(0))
