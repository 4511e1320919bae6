"""Projection weights by role and head, which one mixer can copy from another."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from ..roles import RowBlock


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
