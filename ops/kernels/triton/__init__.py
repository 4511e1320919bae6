"""Kernels in Triton. `tiles` and `launch` are shared; each family has an op, launch code and jitted bodies."""
