"""How the Triton kernels of the decay family are launched: tables of configurations, and one call of the bodies.

The notation and what each body computes stand in triton.py. This module needs no triton: it is imported where a kernel
is launched.
"""

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chunks import capacity
from ..recurrence import Recurrence

MAX_KEY_WIDTH, MAX_VALUE_WIDTH = 256, 512
"""The paper's head."""

FUSED = {"enable_fp_fusion": True}
"""A product and a sum are one instruction; explicit, since Triton's default is about to change."""


REGISTERS = 65536
"""Of a multiprocessor."""


class Launch(NamedTuple):
    """How one body runs."""

    tile: tuple[int, int]
    """Of a scan, keys and values of a state's tile; of a band, inner width per step and columns of the result."""
    warps: int
    stages: int
    """Steps of a loop whose loads are in flight at once."""
    blocks: int = 1
    """Blocks that a multiprocessor holds: registers are capped for them, and what a compiler makes is held to it."""

    @property
    def options(self) -> dict[str, Any]:
        """For the launcher."""
        # registers are given to threads by eights
        cap = {"maxnreg": REGISTERS // (32 * self.warps * self.blocks) // 8 * 8} if self.blocks > 1 else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **cap, **FUSED}


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


def configurations(bits: int, key_width: int, value_width: int) -> tuple[Configuration, ...]:
    """The table for GPUs, the largest chunk first, for elements of so many bits.

    What memory bounds, a scan and everything of narrow heads, wants several blocks: one computes while others wait.
    """
    if bits == 32:
        scan, forward, backward = Launch((64, 64), 8, 3), Launch((32, 64), 8, 2), Launch((32, 32), 4, 2)
        return (Configuration(32, scan, scan, forward, backward, backward),)
    if max(key_width, value_width) <= 64:
        four, three = Launch((64, 64), 4, 3, blocks=4), Launch((64, 64), 4, 3, blocks=3)
        return (Configuration(64, four, three, four, four, three),)
    # a forward band has as many columns as a value
    columns = 64 if value_width <= 64 else 128
    scan = Launch((64, 64), 8, 3, blocks=2)
    large = Configuration(
        128,
        scan=scan,
        token_scan=scan,
        forward=Launch((64, columns), 8, 3),
        backward=Launch((64, 128), 8, 3),
        decay_backward=Launch((64, 64), 8, 3),
    )
    four = Launch((64, 128), 4, 3, blocks=2)
    return large, Configuration(64, four, four, four._replace(tile=(64, columns)), four, four)


_SMALL = Launch((16, 32), 1, 1)
INTERPRETED = tuple(Configuration(chunk, _SMALL, _SMALL, _SMALL, _SMALL, _SMALL) for chunk in (32, 16))
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
    table = configurations(8 * x.q.element_size(), x.q.shape[3], x.v.shape[3])
    if torch.cuda.get_device_capability(x.q.device) != (9, 0):
        # the large ones are known to fit Hopper, and the smallest fits what has less shared memory
        return table[-1]
    return choose(table, x.chunk_size)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernels() -> Any:
    """The jitted functions; imports triton."""
    return import_module(f"{__package__}.triton_kernels")


class Launcher:
    """One call of the chunkwise op: what its bodies have in common, and how each is launched."""

    def __init__(self, x: Recurrence, needs_log_decay: bool = False) -> None:
        log_decay, cu_seqlens = x.log_decay, x.cu_seqlens
        self.kernels = kernels()
        self.configuration = configuration_of(x)
        self.chunk = self.configuration.chunk
        full = needs_log_decay or (log_decay is not None and log_decay.ndim == 3)
        self.backward = self.configuration.decay_backward if full else self.configuration.backward
        self.q, self.k, self.v = (readable(tensor, self.chunk) for tensor in (x.q, x.k, x.v))
        self.batch, self.length, self.heads, self.key_width = x.q.shape
        self.value_width = x.v.shape[3]
        self.log_decay = None if log_decay is None else log_decay.contiguous()
        # its kernels take no stride of the boundaries, which may be a column
        self.boundaries = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.firsts, self.table = None, None
        if cu_seqlens is not None:
            self.firsts, self.table = chunk_table(cu_seqlens, self.length, self.chunk)
        self.rows = x.rows
        self.chunks = self.batch * capacity(self.length, self.chunk, cu_seqlens)
        plane = self.batch * self.heads * self.length
        sizes = {"length": self.length, "heads": self.heads, "chunks_a_row": -(-self.length // self.chunk)}
        self.common = {**sizes, "plane": plane, "C": self.chunk}
        # decays fixed per head are rates; those given for each token become clocks
        given = log_decay is not None and log_decay.ndim == 3
        self.decays = {"rates": None if given else self.log_decay, "clocks": self._clocks() if given else None}
        self.common |= {**self.decays, "scale": x.scale, "K": self.key_width, "V": self.value_width}
        operands = {"q": self.q, "k": self.k, "v": self.v}
        self.in_bands = {**self.common, **operands, **strides(**operands), "table": self.table, "chunks": self.chunks}

    def _clocks(self) -> Tensor:
        """Of decays that are given for each token: [2 B H T]."""
        assert self.log_decay is not None
        clocks = self.log_decay.new_empty(2, self.batch, self.heads, self.length)
        self.kernels.clocks[(self.chunks * self.heads,)](
            log_decay=self.log_decay, clocks=clocks, table=self.table, chunks=self.chunks, **self.common, **FUSED
        )
        return clocks

    def new_states(self) -> Tensor:
        """Room for one state per chunk, as narrow as the inputs."""
        return self.q.new_empty(self.chunks, self.heads, self.key_width, self.value_width)

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

    def backward_band(self, do: Tensor, results: Mapping[str, Tensor | None], **states: Tensor) -> None:
        """Fill the results dq, dk, dv, and `sums` if they are wanted, from `states` and `d_states`."""
        launch = self.backward
        roles = 2 * self.key_tiles - (-self.value_width // launch.tile[1])
        self.kernels.band_backward[(roles * self.chunks * self.heads,)](
            do=do,
            **states,
            **results,
            TILE_INNER=launch.tile[0],
            TILE_OUTER=launch.tile[1],
            **self.in_bands,
            **strides(do=do),
            **launch.options,
        )

    def decay_gradient(self, do: Tensor, sums: Tensor, products: Tensor, out: Tensor) -> None:
        """Fill `out`, the gradient of the log-decay."""
        launch = self.backward
        by_chunk = out if self.decays["rates"] is None else out.new_zeros(self.chunks, self.heads)
        self.kernels.decay_gradient[(self.chunks * self.heads,)](
            do=do,
            sums=sums,
            products=products,
            out=by_chunk,
            TILE_INNER=launch.tile[0],
            TILES=self.key_tiles,
            PRODUCTS=self.scan_tiles,
            **self.in_bands,
            **strides(do=do),
            **launch.options,
        )
        if self.decays["rates"] is not None:
            out.copy_(by_chunk.sum(0))


def chunk_table(cu_seqlens: Tensor, length: int, chunk: int) -> tuple[Tensor, Tensor]:
    """How packed documents are cut; nothing waits for the device.

    Returns:
        each document's first chunk [N + 1], and each chunk's first token and number of tokens [chunks 2], which is 0
        for those that are over: there is room for as many as there can be.
    """
    boundaries = cu_seqlens.long()
    firsts = F.pad(((boundaries.diff() + chunk - 1) // chunk).cumsum(0), (1, 0))
    documents = boundaries.shape[0] - 1
    number = torch.arange(capacity(length, chunk, cu_seqlens), device=boundaries.device)
    document = (torch.searchsorted(firsts, number, right=True) - 1).clamp_(max=documents - 1)
    start = boundaries[document] + (number - firsts[document]) * chunk
    tokens = (boundaries[document + 1] - start).clamp_(0, chunk)
    return firsts, torch.stack((start, tokens), dim=1)


def readable(x: Tensor, chunk: int) -> Tensor:
    """x [B T H D] as it lies, if its rows are contiguous and a chunk's offsets fit 32 bits."""
    return x if x.stride(3) == 1 and min(chunk, x.shape[1]) * x.stride(1) < 2**31 else x.contiguous()


def strides(*axes: str, **tensors: Tensor) -> dict[str, int]:
    """As the jitted functions name them, of some axes or all."""
    numbers = {"row": 0, "token": 1, "head": 2}
    return {f"{name}_{axis}": x.stride(numbers[axis]) for name, x in tensors.items() for axis in axes or numbers}
