"""The three ways to compute a sequence map."""

from enum import StrEnum

from ...registry import SeqmixError, choices_hint


class Paradigm(StrEnum):
    """Method of computing a sequence map; all methods give the same result."""

    PARALLEL = "parallel"
    """All tokens at once; quadratic in the segment's length."""
    RECURRENT = "recurrent"
    """Token by token through the state."""
    CHUNKWISE = "chunkwise"
    """Parallel inside chunks, recurrent between them; linear in the segment's length for constant states."""

    @classmethod
    def named(cls, name: "Paradigm | str") -> "Paradigm":
        """Return the paradigm with this name; raise a SeqmixError if it is unknown."""
        try:
            return cls(name)
        except ValueError:
            raise SeqmixError(f"unknown paradigm {name!r}{choices_hint(name, cls, 'paradigms')}") from None
