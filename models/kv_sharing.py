"""Sharing of keys and values between layers: which layers read the keys and values of which earlier layer.

    last      the last n layers read those of the last earlier layer of the same block (Gemma 3n and 4; YOCO, arXiv
              2405.05254, whose layers before are a self-decoder with a constant state)
    groups    the layers of a block form groups, which read those of their first layer (CLA, arXiv 2405.12981)

A layer that reads has projections of queries and of the output only, and no cache. Layers of one block have the same
mixer, so the keys and values fit. In YOCO, the keys and values have a norm and projections outside the layers; here
they are those of the first layer that uses them.
"""

from collections.abc import Collection, Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from ..registry import Config


class LastLayers(Config):
    """The last layers read the keys and values of the last earlier layer of the same block."""

    kind: Literal["last"] = "last"
    layers: int = Field(gt=0, le=10_000)
    """Number of last layers that read; those among them whose mixers have no keys and values to share stay as they
    are."""


class Groups(Config):
    """Consecutive layers of the same block read the keys and values of the first of them."""

    kind: Literal["groups"] = "groups"
    size: int = Field(ge=2, le=10_000)
    """Number of layers of a block that have the same keys and values."""


KVSharing: TypeAlias = Annotated[LastLayers | Groups, Field(discriminator="kind")]


def kv_sources(
    sharing: LastLayers | Groups | None, layers: Sequence[str], sharable: Collection[str]
) -> tuple[int | None, ...]:
    """Return for each layer the index of the layer whose keys and values it reads; None if it has its own.

    Args:
        sharing: the configuration; None for layers that all have their own.
        layers: name of each layer's block.
        sharable: names of the blocks whose mixers can share keys and values.

    Raises:
        ValueError: no layer would read, or one has no earlier layer to read from.
    """
    if sharing is None:
        return (None,) * len(layers)
    places = {name: [i for i, layer in enumerate(layers) if layer == name] for name in layers if name in sharable}
    sources: dict[int, int] = {}
    for name, indices in places.items():
        if isinstance(sharing, Groups):
            sources |= {i: indices[n - n % sharing.size] for n, i in enumerate(indices) if n % sharing.size}
            continue
        first = len(layers) - sharing.layers
        if (readers := [i for i in indices if i >= first]) and indices[0] >= first:
            fewer = len(layers) - 1 - max(own[0] for own in places.values())
            raise ValueError(
                f"layers = {sharing.layers} leaves no earlier layer of block {name} to read from: "
                + (f"set it to at most {fewer}" if fewer > 0 else f"give {name} more layers")
            )
        sources |= {i: max(own for own in indices if own < first) for i in readers}
    if not sources:
        raise ValueError(
            "no layer would read keys and values of an earlier one: expected layers of one block whose mixers can "
            "share them, such as attention without forget_gate, value_residual and short_conv, got the pattern "
            f"{', '.join(layers[:10])}, of which {', '.join(sharable) or 'no block'} can share"
        )
    return tuple(sources.get(i) for i in range(len(layers)))
