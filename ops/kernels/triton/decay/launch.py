"""Launch code of the decay family's Triton kernels: the table of configurations, and the launches of one call.

op.py explains the notation and what each jitted function computes. This module does not import triton; `kernels` does,
when a kernel is launched.
"""

from collections.abc import Mapping
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ....recurrence.family import Recurrence
from ....recurrence.groups import capacity
from ....runtime.kernel import Probe
from ..launch import FUSED, Launch, addressable, chunk_table, is_interpreted, kernels, strides

MAX_KEY_WIDTH, MAX_VALUE_WIDTH = 256, 512
"""Largest supported widths of a head's keys and values, those of the RetNet paper."""


def width_limits(probe: Probe) -> list[str]:
    """Return a sentence in a list if a call's heads are too wide; an empty list if they are not."""
    if probe.key_width <= MAX_KEY_WIDTH and probe.value_width <= MAX_VALUE_WIDTH:
        return []
    limit = f"keys must be at most {MAX_KEY_WIDTH} and values at most {MAX_VALUE_WIDTH} wide"
    return [f"{limit}, got {probe.key_width} and {probe.value_width}"]


class Configuration(NamedTuple):
    """Launch configurations of the chunkwise functions for one dtype and width of heads.

    op.py explains the functions: scans go over the chunks, bands compute the products inside chunks.
    """

    chunk: int
    """C, tokens per chunk."""
    scan: Launch
    """Scan over chunks, with decays fixed per head or without decays."""
    token_scan: Launch
    """Scan over chunks with decays per token, whose clocks (sums of log-decays) take registers."""
    forward: Launch
    """Products inside chunks in the forward pass (forward band)."""
    backward: Launch
    """Products inside chunks in the backward pass (backward band)."""
    decay_backward: Launch
    """Backward band with decays per token, or with gradients of log-decays: clocks and sums take registers."""
    keys: Launch | None = None
    """Functions for decays per key dimension (tile: a step of values, a tile of keys); None if they are unsupported."""
    precision: str = "ieee"
    """Precision of float32 products: `ieee`, or `tf32x3` for three TF32 products on tensor cores."""


def configurations(bits: int, key_width: int, value_width: int, *, tf32x3: bool = False) -> tuple[Configuration, ...]:
    """Return the configurations for GPUs, largest chunk first, for elements of `bits` bits.

    Functions bound by memory (scans, and all functions of narrow heads) run several blocks per multiprocessor, so that
    one computes while others wait.
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
    # the columns of a forward band are those of the values
    columns = 64 if value_width <= 64 else 128
    scan = Launch((64, 64), 8, 3, blocks=2)
    large = Configuration(
        128,
        scan=scan,
        token_scan=scan._replace(stages=2),  # float16 spills registers with three
        forward=Launch((64, columns), 8, 3),
        backward=Launch((64, 128), 8, 3),
        decay_backward=Launch((64, 64), 8, 3),
    )
    four = Launch((64, 128), 4, 3, blocks=2)
    return large, Configuration(64, four, four, four._replace(tile=(64, columns)), four, four, Launch((64, 32), 8, 2))


_SMALL = Launch((16, 32), 1, 1)
INTERPRETED = tuple(Configuration(chunk, *[_SMALL] * 6, precision="ieee") for chunk in (32, 16))
"""Configurations for Triton's interpreter, with small tiles, so that short inputs have several tiles and chunks."""

STEP = Launch((MAX_KEY_WIDTH, 32), 4, 1)
"""Tile and launch options of the decoding step; the tile spans the whole key width."""


def choose_configuration(table: tuple[Configuration, ...], chunk_size: int) -> Configuration:
    """Return the configuration with the largest chunk of at most `chunk_size` tokens, or the last one if none fits."""
    return next((configuration for configuration in table if configuration.chunk <= chunk_size), table[-1])


def configuration_of(x: Recurrence) -> Configuration:
    """Return the configuration of a call on its device."""
    if is_interpreted():
        return choose_configuration(INTERPRETED, x.chunk_size)
    table = configurations(8 * x.q.element_size(), x.q.shape[3], x.v.shape[3], tf32x3=x.tf32x3)
    if torch.cuda.get_device_capability(x.q.device) != (9, 0):
        # large chunks are only known to fit Hopper; the smallest fits GPUs with less shared memory
        return table[-1]
    return choose_configuration(table, x.chunk_size)


class Launcher:
    """Launches of one call of the chunkwise op: the arguments that its functions share, and a method per launch."""

    def __init__(self, x: Recurrence, needs_log_decay: bool = False, *, d_final: bool = False) -> None:
        """Prepare the launches of a call.

        Args:
            x: the call.
            needs_log_decay: True if the gradient of log-decays is required.
            d_final: True if the final state has a gradient.
        """
        log_decay, cu_seqlens = x.log_decay, x.cu_seqlens
        self.kernels = kernels("decay")
        self.configuration = configuration_of(x)
        self.chunk = self.configuration.chunk
        per_token = log_decay is not None and log_decay.ndim == 3
        uses_decay_backward = needs_log_decay or per_token
        self.backward = self.configuration.decay_backward if uses_decay_backward else self.configuration.backward
        self.q, self.k, self.v = (addressable(tensor, self.chunk) for tensor in (x.q, x.k, x.v))
        # operands of the scans
        self.queries, self.keys = self.q, self.k
        # set for decays per key dimension: decays of whole chunks, [chunks H K], and A, [chunks H C C]
        self.totals, self.scores = None, None
        # set also for the delta rule: decayed keys that predict, [B T H K], and pairs of keys, [chunks H C C]
        self.reads, self.pairs = None, None
        self.batch, self.length, self.heads, self.value_width = x.v.shape
        self.key_width, self.shared = x.q.shape[3], x.heads_per_key
        self.log_decay = None if log_decay is None else log_decay.contiguous()
        # kernels assume a stride of 1, and the boundaries may be a column
        self.boundaries = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.firsts, self.table = None, None
        if cu_seqlens is not None:
            starts = x.initial_state is not None
            self.firsts, self.table = chunk_table(cu_seqlens, self.length, self.chunk, starts=starts, ends=d_final)
        self.rows = x.rows
        self.chunks = self.batch * capacity(self.length, self.chunk, cu_seqlens)
        # numbers of stored entry states and of gradients of exit states; where those of documents are zero, as many as
        # for one long document
        self.entries, self.exits = (
            self.batch * capacity(self.length, self.chunk, cu_seqlens if per_document else None)
            for per_document in (x.initial_state is not None, d_final)
        )
        # decays fixed per head are passed as rates, decays per token as clocks
        self.common = {
            "length": self.length,
            "heads": self.heads,
            "chunks_a_row": -(-self.length // self.chunk),
            "plane": self.batch * self.heads * self.length,
            "C": self.chunk,
        }
        self.decays = {
            "rates": None if per_token else self.log_decay,
            "clocks": self._compute_clocks() if per_token else None,
        }
        self.common |= {**self.decays, "scale": x.scale, "K": self.key_width, "V": self.value_width}
        operands = {"q": self.q, "k": self.k, "v": self.v}
        self.band_arguments = {
            **self.common,
            **operands,
            **strides(**operands),
            "table": self.table,
            "chunks": self.chunks,
            "shared": self.shared,
            "PRECISION": self.configuration.precision,
        }

    def _compute_clocks(self) -> Tensor:
        """Compute the clocks of decays per token, [2 B H T]."""
        assert self.log_decay is not None
        clocks = self.log_decay.new_empty(2, self.batch, self.heads, self.length)
        self.kernels.clocks[(self.chunks * self.heads,)](
            log_decay=self.log_decay, clocks=clocks, table=self.table, chunks=self.chunks, **self.common, **FUSED
        )
        return clocks

    def with_operands(self, scale: float | None = None, **operands: Tensor) -> "Launcher":
        """Return a copy whose products inside chunks use other queries, keys or values, or another scale."""
        other = copy(self)
        changed_scale = {} if scale is None else {"scale": scale}
        other.band_arguments = {**self.band_arguments, **operands, **strides(**operands), **changed_scale}
        return other

    def new_states(self, number: int) -> Tensor:
        """Allocate `number` states in the inputs' dtype, [number H K V]."""
        return self.q.new_empty(number, self.heads, self.key_width, self.value_width)

    @property
    def _scan(self) -> Launch:
        return self.configuration.scan if self.decays["clocks"] is None else self.configuration.token_scan

    @property
    def scan_tiles(self) -> int:
        """Number of tiles that the scan divides a state into."""
        tile_k, tile_v = self._scan.tile
        return -(-self.key_width // tile_k) * -(-self.value_width // tile_v)

    def scan(
        self, x: Tensor, w: Tensor, states: Tensor, ends: Mapping[str, Tensor | None], *, reverse: bool = False
    ) -> None:
        """Scan over chunks, and fill `states`.

        `ends` may have `initial`, read as the first state; `final`, filled with the last one; and, in reverse, the
        chunks' `entries` and `products`, filled with the entry states' inner products with the gradients.
        """
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
        """Compute the output from the chunks' entry states, and write it to `output`."""
        launch = self.configuration.forward
        tiles = -(-self.value_width // launch.tile[1])
        self.kernels.band_forward[(tiles * self.chunks * self.heads,)](
            states=states,
            out=output,
            TILE_INNER=launch.tile[0],
            TILE_OUTER=launch.tile[1],
            **self.band_arguments,
            **launch.options,
        )

    @property
    def key_tiles(self) -> int:
        """Number of tiles that dq and dk are divided into."""
        return -(-self.key_width // self.backward.tile[1])

    def new_products(self, tiles: int) -> Tensor | None:
        """Allocate the inner products <S, dS'> of a reversed scan, [chunks H tiles]; None if they are not needed."""
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
        """Compute gradients and write them to `out`: those of q and k, and those of v and log_decay if `out` has them.

        Args:
            do: gradient of the output.
            out: tensors to fill, by name of the input.
            products: <S, dS'> of the scan, [chunks H tiles]; None means zero.
            strict: True if a query does not see its own token's key.
            states: `states` (entry states of the chunks), and `d_states` (gradients of their exit states) or None.
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
            **self.band_arguments,
            **strides(do=do),
            **launch.options,
        )
        if log_decay is not None:
            self._decay_gradient(do, sums, products, log_decay)

    def _decay_gradient(self, do: Tensor, sums: Tensor | None, products: Tensor | None, out: Tensor) -> None:
        """Compute the gradient of log-decays, and write it to `out`."""
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
            **self.band_arguments,
            **strides(do=do),
            **launch.options,
        )
        if self.decays["rates"] is not None:
            out.copy_(by_chunk.sum(0))
