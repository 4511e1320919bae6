"""Skip steps whose loss or gradient is not finite, or whose gradient is far larger than usual."""

import math
from collections import deque
from statistics import median

from .config import TrainingConfig

WINDOW = 64
"""Number of most recent gradient norms whose median is compared with the next norm."""
MIN_NORMS = 16
"""Minimum number of gradient norms before any norm can count as a spike."""
MAX_NONFINITE_IN_A_ROW = 10
"""Maximum number of non-finite steps in a row; more end the run, as the parameters are at fault."""


class Skipping:
    """Decides which steps to skip, and counts them; its decisions are the same on all processes."""

    def __init__(self, settings: TrainingConfig) -> None:
        self.spike = settings.max_grad_norm_spike
        self.enabled = settings.skip_nonfinite or self.spike is not None
        self.norms: deque[float] = deque(maxlen=WINDOW)
        """Gradient norms of the last steps that were not skipped."""
        self.skipped = 0
        """Number of skipped steps so far."""
        self.nonfinite_in_a_row = 0

    def reason(self, norm: float) -> str | None:
        """Return why to skip a step with this finite gradient norm; None to take the step."""
        self.nonfinite_in_a_row = 0
        if self.spike is None:
            return None
        usual = median(self.norms) if len(self.norms) >= MIN_NORMS else math.inf
        if norm > self.spike * usual:
            times = norm / usual
            return (
                f"the gradient's norm is {norm:.3g}, {times:.3g} times the median of the last {len(self.norms)} steps"
            )
        self.norms.append(norm)
        return None

    def count_nonfinite(self) -> bool:
        """Count a non-finite step; return True if there were too many in a row."""
        self.nonfinite_in_a_row += 1
        return self.nonfinite_in_a_row > MAX_NONFINITE_IN_A_ROW
