"""Comparison of derivatives with central differences."""

from collections.abc import Callable, Mapping

STEPS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
"""Step sizes to try: a large step may cross a kink, such as that of a maximum; a smaller one may not."""


ALLOWED = 1e-6
"""Tolerance of a derivative against differences, relative to the sum of the absolute values of its terms."""


def agrees(
    names: list[str], slopes: Mapping[str, float], size: float, rate: Callable[[list[str], float], float]
) -> bool:
    """Return True if the slope along some tensors equals the difference quotient with at least one of the steps.

    Args:
        names: names of the tensors to vary together.
        slopes: derivative along the direction in which each tensor varies, by name.
        size: sum of the absolute values of the slope's terms.
        rate: returns the difference quotient for some names and a step.
    """
    slope = sum(slopes[name] for name in names)
    return any(abs(rate(names, step) - slope) <= ALLOWED * size for step in STEPS)
