"""Parts of projections: weights by role and head, which one mixer can copy from another, and products of row blocks."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..base.roles import RowBlock


def projections_of(
    in_proj: nn.Linear, out_proj: nn.Linear, blocks: Sequence[RowBlock], output_heads: int
) -> dict[str, Float[Tensor, "H _ D"]]:
    """Return views of the weights of queries, keys, values and output, as `SequenceMixer.projections`.

    Args:
        in_proj: input projection.
        out_proj: output projection.
        blocks: blocks of rows of `in_proj`, of which those named `q`, `k` and `v` are returned.
        output_heads: number of heads of the output.
    """
    rows = in_proj.weight.split([block.rows for block in blocks])
    named = zip(blocks, rows, strict=True)
    views = {block.name: view.unflatten(0, (block.heads, -1)) for block, view in named if block.name in ("q", "k", "v")}
    return views | {"o": out_proj.weight.T.unflatten(0, (output_heads, -1))}


def apply_row_blocks(layer: nn.Linear, inputs: Sequence[Float[Tensor, "*batch D"]]) -> list[Float[Tensor, "*batch R"]]:
    """Apply equal blocks of rows of a layer without bias, from the first row to the last, to one input each."""
    forward_rows = getattr(layer, "forward_rows", None)
    if forward_rows is None:
        return [F.linear(x, rows) for x, rows in zip(inputs, layer.weight.chunk(len(inputs)), strict=True)]
    size = layer.out_features // len(inputs)  # quantised weights, which a layer multiplies itself
    return [forward_rows(x, slice(n * size, (n + 1) * size)) for n, x in enumerate(inputs)]
