"""The delta family: DeltaNet, Gated DeltaNet, Kimi Delta Attention and DeltaProduct."""

from ...registry.deprecated import former_names
from .api import DELTA, delta, delta_flops, delta_product, unit_norm

__all__ = ["DELTA", "delta", "delta_flops", "delta_product", "unit_norm"]
__getattr__ = former_names(__name__, {"delta_rule": "delta"})
