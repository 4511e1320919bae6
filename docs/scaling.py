"""Write what docs/scaling.md computes: `python docs/scaling.py`.

What a context sends is counted in a layer of each tiny preset, on tensors without memory. Memory, traffic and time of
the large model follow from `seqmix.account` by the formulas of the page.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from seqmix import account, load_config
from seqmix.benchmarks.presets import mixer_kind, single_kind_presets
from seqmix.experiments.pages import fill, table
from seqmix.models.accounting import ModelCost
from seqmix.models.builder import build_meta
from seqmix.ops.context_parallel import ContextParallel

TARGET = Path(__file__).with_name("scaling.md")
PRESET, LENGTH = "retnet-6.7b", 2048
TOKENS = 2**22
"""Of a step: the preset's own."""
PEAK, USED = 989e12, 0.4
"""Operations a second of an H100 in bfloat16 by its data sheet, and the share of it that is assumed."""
INSIDE, BETWEEN = 300e9, 40e9
"""Bytes a second that a GPU is assumed to get from the others of its machine, and from other machines."""
OF_MACHINE = 8
"""GPUs of a machine."""


@dataclass(frozen=True)
class Layout:
    """How many processes, and sequences that each computes at once."""

    data: int
    shard: int
    sequences: int

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.data * self.shard


LAYOUTS = (Layout(1, 8, 4), Layout(8, 8, 4), Layout(1, 64, 4))


def parts(layout: Layout) -> int:
    """Parts of a step (`training.grad_accum_steps`)."""
    return TOKENS // (layout.gpus * layout.sequences * LENGTH)


def memory(cost: ModelCost, narrow: ModelCost, layout: Layout) -> float:
    """Bytes of a GPU: parameters, gradients and two moments in pieces, what is gathered, and activations.

    Gathered are two blocks, and embedding and output projection with their gradients; activations are the blocks'
    inputs and those of the block that is recomputed, and the logits that are there at once.
    """
    block = max(layer.parameters for layer in cost.layers)
    inside = max(layer.activation_bytes for layer in narrow.layers)
    d_model = load_config(PRESET).model.d_model
    inputs = 4 * d_model * LENGTH * len(cost.layers)
    pieces = 16 * cost.parameters / layout.shard
    gathered = 4 * (2 * block + 2 * cost.embedding_parameters)
    return pieces + gathered + layout.sequences * (inputs + inside) + 2 * 4 * 2**24


def traffic(cost: ModelCost, layout: Layout) -> tuple[float, float]:
    """Bytes a GPU receives for a part of a step: from those that it shares a copy with, and from other copies.

    Parameters are gathered twice and gradients scattered once, in float32; pieces of gradients are added up over
    copies.
    """
    pieces = 3 * 4 * cost.parameters * (layout.shard - 1) / layout.shard
    copies = 2 * 4 * cost.parameters / layout.shard * (layout.data - 1) / layout.data
    return pieces, copies


def seconds(cost: ModelCost, layout: Layout) -> tuple[float, float]:
    """Of a step: its operations (forward, once more, and twice that backward), and its traffic, were it alone."""
    pieces, copies = traffic(cost, layout)
    of_pieces = INSIDE if layout.shard <= OF_MACHINE else BETWEEN
    sending = parts(layout) * (pieces / of_pieces + copies / BETWEEN)
    return 4 * cost.flops_per_token * TOKENS / (layout.gpus * PEAK * USED), sending


def received(preset: str, tokens: int, ranks: int) -> int:
    """Bytes that the first layer of a preset receives for a sequence of so many tokens, forward and backward."""
    mixer = build_meta(load_config(preset).model).blocks[0].mixer
    with _counting(ranks) as counted:
        mixer.cp_group = ContextParallel("", rank=ranks - 1, size=ranks)
        mixer(torch.empty(1, tokens // ranks, load_config(preset).model.d_model, device="meta"))
    return sum(counted)


@contextmanager
def _counting(ranks: int) -> Iterator[list[int]]:
    """Count what is gathered, and what of it comes back as gradients, in place of sending it."""
    counted: list[int] = []

    def gather(_: ContextParallel, x: Tensor) -> Tensor:
        counted.append((1 + x.is_floating_point()) * (ranks - 1) * x.nbytes)
        return x.expand(ranks, *x.shape)

    with mock.patch.object(ContextParallel, "gather", gather):
        yield counted


def _context_table() -> list[str]:
    rows = []
    for name, config in single_kind_presets().items():
        kind = mixer_kind(config)
        short, long = (received(name, tokens, 2) for tokens in (2**12, 2**20))
        how = "states" if short == long else "keys and values" if kind == "attention" else "inputs"
        rows.append((f"`{kind}`", how, _size(short), _size(long)))
    return table(["mixer", "how segments meet", "4,096 tokens", "1,048,576 tokens"], rows)


def _estimates() -> list[str]:
    model = load_config(PRESET).model
    cost, narrow = account(model, length=LENGTH), account(model, length=LENGTH, dtype=torch.bfloat16)
    rows = []
    for layout in LAYOUTS:
        pieces, copies = traffic(cost, layout)
        sizes = _size(memory(cost, narrow, layout)), " + ".join(map(_size, filter(None, (pieces, copies))))
        spent = [f"{took:.1f} s" for took in seconds(cost, layout)]
        rows.append((layout.gpus, f"`data: {layout.data}, shard: {layout.shard}`", parts(layout), *sizes, *spent))
    heads = ["GPUs", "`distributed`", "`grad_accum_steps`", "memory", "received a part"]
    return table([*heads, "computing a step", "sending a step"], rows)


def _size(count: float) -> str:
    unit = min(int(math.log(count, 1024)), 3)
    return f"{count / 1024**unit:,.1f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def render() -> str:
    """The page, with what is computed."""
    page = fill(TARGET.read_text(encoding="utf-8"), "context", _context_table())
    return fill(page, "estimates", _estimates())


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
