"""Causal convolutions, short and long."""
