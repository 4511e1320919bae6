"""Steps that are skipped: their loss or gradient is not finite, or their gradient is far larger than usual."""

import math
from collections import deque
from statistics import median

from .config import TrainingConfig

WINDOW = 64
LEAST = 16
"""Steps whose gradient norms are remembered at most, and those without which nothing is a spike."""
IN_A_ROW = 10
"""Steps in a row that are skipped for numbers that are not finite: after more, the parameters are at fault."""


class Skipping:
    """What makes a step one to skip, and how many were skipped; the same on all processes."""

    def __init__(self, settings: TrainingConfig) -> None:
        self.spike = settings.max_grad_norm_spike
        self.enabled = settings.skip_nonfinite or self.spike is not None
        self.norms: deque[float] = deque(maxlen=WINDOW)
        """Of the last steps that were taken."""
        self.skipped = 0
        self.nonfinite_in_a_row = 0

    def reason(self, norm: float) -> str | None:
        """Why a step with this finite gradient norm is skipped; None if it is taken."""
        self.nonfinite_in_a_row = 0
        if self.spike is None:
            return None
        usual = median(self.norms) if len(self.norms) >= LEAST else math.inf
        if norm > self.spike * usual:
            return f"the gradient's norm is {norm:.3g}, {norm / usual:.3g} times the median of {len(self.norms)} steps"
        self.norms.append(norm)
        return None

    def hopeless(self) -> bool:
        """Count a step that is not finite; whether too many in a row were."""
        self.nonfinite_in_a_row += 1
        return self.nonfinite_in_a_row > IN_A_ROW
