"""The delta family: DeltaNet and Gated DeltaNet."""

from .api import DELTA, delta, delta_flops, delta_rule, unit_norm

__all__ = ["DELTA", "delta", "delta_flops", "delta_rule", "unit_norm"]
