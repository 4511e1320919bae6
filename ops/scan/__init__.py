"""Recurrences whose state is a vector, element by element: h_t = a_t h_{t-1} + b_t."""

from .api import (
    SCAN_PARADIGMS,
    ScanOutput,
    diagonal_recurrence,
    diagonal_scan,
    log_scan,
    log_scan_recurrence,
    scan,
    scan_recurrence,
    selective_recurrence,
    selective_scan,
)

__all__ = [
    "SCAN_PARADIGMS",
    "ScanOutput",
    "diagonal_recurrence",
    "diagonal_scan",
    "log_scan",
    "log_scan_recurrence",
    "scan",
    "scan_recurrence",
    "selective_recurrence",
    "selective_scan",
]
