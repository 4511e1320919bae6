"""Projections by role and head: what one mixer can take over from another."""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor, nn


def projections_of(
    in_proj: nn.Linear, out_proj: nn.Linear, widths: Mapping[str, int], heads: Mapping[str, int]
) -> dict[str, Float[Tensor, "H _ D"]]:
    """Views of the weights of queries, keys, values and output, as `SequenceMixer.projections` has them.

    `widths` are rows of each projection by name, in their order; `heads` those of the three, and of `o` if the output
    has others than the values.
    """
    rows = dict(zip(widths, in_proj.weight.split(list(widths.values())), strict=True))
    found = {role: rows[role].unflatten(0, (heads[role], -1)) for role in "qkv"}
    return found | {"o": out_proj.weight.T.unflatten(0, (heads.get("o", heads["v"]), -1))}
