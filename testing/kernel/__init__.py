"""Kernels under test: each op's definition in float64, the calls that are drawn, and the checks."""
