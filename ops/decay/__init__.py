"""The decay family: linear attention, retention, Mamba-2, gated linear attention."""

from ...registry.deprecated import former_names
from .api import DECAY, Backend, decay, decay_flops, decay_reading_values

__all__ = ["DECAY", "Backend", "decay", "decay_flops", "decay_reading_values"]
__getattr__ = former_names(__name__, {"decay_recurrence": "decay"})
