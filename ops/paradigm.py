"""The three ways to compute a sequence map."""

from enum import StrEnum


class Paradigm(StrEnum):
    """How a sequence map is computed, never what it computes."""

    PARALLEL = "parallel"
    """All tokens at once; quadratic in the segment's length."""
    RECURRENT = "recurrent"
    """Token by token through the state."""
    CHUNKWISE = "chunkwise"
    """Parallel inside chunks, recurrent between them; linear in the segment's length for constant states."""
