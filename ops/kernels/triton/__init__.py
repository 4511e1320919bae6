"""Kernels in Triton: `tiles` and `launch` are shared; a family has its op, its launch, and its jitted bodies."""
