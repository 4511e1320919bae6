"""The delta family: DeltaNet, Gated DeltaNet, Kimi Delta Attention and DeltaProduct."""

from .api import DELTA, delta, delta_flops, delta_product, delta_rule, unit_norm

__all__ = ["DELTA", "delta", "delta_flops", "delta_product", "delta_rule", "unit_norm"]
