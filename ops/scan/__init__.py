"""Recurrences whose state is a vector, element by element: h_t = a_t h_{t-1} + b_t."""

from ...registry.deprecated import former_names
from .api import (
    SCAN_PARADIGMS,
    Backend,
    ScanOutput,
    diagonal_scan,
    log_scan,
    scan,
    selective_scan,
)
from .logarithmic import LOG_STATE

__all__ = [
    "LOG_STATE",
    "SCAN_PARADIGMS",
    "Backend",
    "ScanOutput",
    "diagonal_scan",
    "log_scan",
    "scan",
    "selective_scan",
]
__getattr__ = former_names(
    __name__,
    {
        "scan_recurrence": "scan",
        "log_scan_recurrence": "log_scan",
        "selective_recurrence": "selective_scan",
        "diagonal_recurrence": "diagonal_scan",
    },
)
