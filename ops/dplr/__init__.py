"""The delta rule with separate keys for reading and writing: Gated DeltaNet-2 and RWKV-7."""

from .api import DPLR, dplr, dplr_recurrence

__all__ = ["DPLR", "dplr", "dplr_recurrence"]
