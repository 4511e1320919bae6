"""Triton kernels of the decay family: scalar decays (`launch`, `bodies`) and decays per key dimension (`per_key_*`)."""
