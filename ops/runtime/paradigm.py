"""The three ways to compute a sequence map."""

from enum import StrEnum

from ...registry import SeqmixError, nearest


class Paradigm(StrEnum):
    """How a sequence map is computed, never what it computes."""

    PARALLEL = "parallel"
    """All tokens at once; quadratic in the segment's length."""
    RECURRENT = "recurrent"
    """Token by token through the state."""
    CHUNKWISE = "chunkwise"
    """Parallel inside chunks, recurrent between them; linear in the segment's length for constant states."""

    @classmethod
    def named(cls, name: "Paradigm | str") -> "Paradigm":
        """The paradigm of a name; a SeqmixError for an unknown one."""
        try:
            return cls(name)
        except ValueError:
            raise SeqmixError(
                f"there is no paradigm {name!r}; paradigms: {', '.join(cls)}{nearest(name, cls)}"
            ) from None
