"""Projection weights by role and head, which one mixer can copy from another."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn


def projections_of(
    in_proj: nn.Linear, out_proj: nn.Linear, widths: Mapping[str, int], heads: Mapping[str, int]
) -> dict[str, Float[Tensor, "H _ D"]]:
    """Return views of the weights of queries, keys, values and output, as `SequenceMixer.projections`.

    Args:
        in_proj: input projection.
        out_proj: output projection.
        widths: rows of `in_proj` by projection, in their order.
        heads: number of heads of `q`, `k` and `v`; also of `o`, if it differs from `v`.
    """
    rows = dict(zip(widths, in_proj.weight.split(list(widths.values())), strict=True))
    views = {role: rows[role].unflatten(0, (heads[role], -1)) for role in "qkv"}
    return views | {"o": out_proj.weight.T.unflatten(0, (heads.get("o", heads["v"]), -1))}
