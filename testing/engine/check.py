"""A check: a named property, what it needs of what is tested, what it draws, and the function that tests it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

S = TypeVar("S")
D = TypeVar("D")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Check(Generic[S, D, T]):
    """One property, of mixers (S is their configuration) or of kernels."""

    name: str
    """As in reports: that of the function."""
    property: str
    """One sentence: the function's docstring."""
    test: Callable[[T], None]
    """Raises where the property does not hold."""
    needs: tuple[Callable[..., str | None], ...]
    """Each gives the reason why there is nothing to test (the trait, by name), or None."""
    draw: D
    """What a case holds."""
    share: float
    """Cases, as a share of the examples asked for; 0 means one."""
    compiles: bool = False
    """True if it compiles, which is slow: left out of quick runs."""
    long: bool = False
    """True if most of its cases have hundreds of tokens: left out of quick runs."""
    stress: bool = False
    """True if it runs under `--stress` alone."""
    use: str = ""
    """Which use breaks where the property does not hold, and how: "training on packed text: documents leak"."""
    remedy: str = ""
    """What to declare or override where a mixer is meant to be so: "declare traits.packing=False"."""

    def examples(self, asked: int) -> int:
        """How many cases to run where `asked` were asked for."""
        return max(1, round(asked * self.share))

    def skip_reason(self, *subject: Any) -> str | None:
        """Why it does not apply to a kernel, or to a configuration and its mixer."""
        return next((reason for need in self.needs if (reason := need(*subject))), None)
