"""A check: a named property, its preconditions, the cases it draws, and the function that tests it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

S = TypeVar("S")
D = TypeVar("D")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Check(Generic[S, D, T]):
    """One property of mixers or of kernels.

    S is the subject (a mixer's configuration, or a kernel), D specifies the cases to draw, T is a trial on one case.
    """

    name: str
    """Name in reports: that of the test function."""
    property: str
    """The property in one sentence: the docstring of the test function."""
    test: Callable[[T], None]
    """Test function: raises if the property does not hold."""
    needs: tuple[Callable[..., str | None], ...]
    """Preconditions: each returns the reason to skip the check (the missing trait, by name), or None."""
    draw: D
    """Kinds of cases to draw."""
    share: float
    """Number of cases to run, as a share of the requested examples; 0 runs one case."""
    compiles: bool = False
    """True if the check compiles the mixer, which is slow: quick runs leave it out."""
    long: bool = False
    """True if most of its cases have hundreds of tokens: quick runs leave it out."""
    stress: bool = False
    """True if the check runs only under `--stress`."""
    use: str = ""
    """Use that breaks if the property does not hold, and how, such as "training on packed text: documents leak"."""
    remedy: str = ""
    """Remedy if a mixer is meant to lack the property, such as "declare traits.packing=False"."""

    def examples(self, requested: int) -> int:
        """Return the number of cases to run when `requested` examples are requested."""
        return max(1, round(requested * self.share))

    def skip_reason(self, *subject: Any) -> str | None:
        """Return why the check does not apply to a kernel, or to a configuration and its mixer; None if it applies."""
        return next((reason for need in self.needs if (reason := need(*subject))), None)
