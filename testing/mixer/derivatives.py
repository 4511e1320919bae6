"""Central differences."""

from collections.abc import Callable, Mapping

STEPS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
"""Steps of the differences: a smaller one where a larger one crosses a kink, as of a maximum."""


ALLOWED = 1e-6
"""Between a derivative and differences, relative to the sum of the absolute values of its terms."""


def agrees(
    names: list[str], slopes: Mapping[str, float], size: float, rate: Callable[[list[str], float], float]
) -> bool:
    """True if the slopes are those of differences with one of the steps."""
    slope = sum(slopes[name] for name in names)
    return any(abs(rate(names, step) - slope) <= ALLOWED * size for step in STEPS)
