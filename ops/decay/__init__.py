"""The decay family: linear attention, retention, Mamba-2, gated linear attention."""

from .api import DECAY, Backend, decay, decay_flops, decay_recurrence

__all__ = ["DECAY", "Backend", "decay", "decay_flops", "decay_recurrence"]
