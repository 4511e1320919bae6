"""Checks of arguments that read no values, and torch's errors about arguments as sentences."""

import re
from typing import Any

from torch import Tensor

from ...registry import SeqmixError

_MISMATCHES = (
    r"mat1 and mat2 shapes cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)",
    r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\) at non-singleton dimension [23]",
)
"""torch's errors about the widths of an input and of a parameter."""


def require_tensor(name: str, value: Any, expected: str) -> None:
    """Raise a SeqmixError if an argument is not a tensor; `expected` describes the tensor."""
    if not isinstance(value, Tensor):
        raise SeqmixError(f"{name} must be {expected}, got a {type(value).__name__}: pass torch.as_tensor({name})")


def expected_width(error: RuntimeError, x: Tensor) -> int | None:
    """Return the width that an operation expected of x, from torch's error about it; None for any other error."""
    for pattern in _MISMATCHES:
        match = re.search(pattern, str(error))
        if match and (width := str(x.shape[-1])) in match.groups():
            return int(match[2] if match[1] == width else match[1])
    return None
