"""The delta rule with separate keys for reading and writing: Gated DeltaNet-2 and RWKV-7."""

from ...registry.deprecated import former_names
from .api import DPLR, dplr

__all__ = ["DPLR", "dplr"]
__getattr__ = former_names(__name__, {"dplr_recurrence": "dplr"})
