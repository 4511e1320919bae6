"""The decay family: linear attention, retention, Mamba-2, gated linear attention."""
