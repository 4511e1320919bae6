"""Durations: `30m`, `90s`, `1h30m`, or a number of seconds. Every time budget is written this way."""

import math
import re
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from .errors import SeqmixError

UNITS = {"h": 3600, "m": 60, "s": 1}
"""Seconds per unit."""
EXPECTED = "expected a duration such as 90s, 30m or 1h30m, or a number of seconds"


def parse_duration(text: str | float) -> float:
    """Return a duration in seconds.

    Args:
        text: hours, minutes and seconds in this order, such as 1h30m; a number without a unit has seconds.

    Raises:
        SeqmixError: the text is not a duration above 0.
    """
    number = r"(\d+(?:\.\d+)?)"
    written = f"{text}s" if re.fullmatch(number, str(text)) else str(text)
    if match := re.fullmatch(rf"(?:{number}h)?(?:{number}m)?(?:{number}s)?", written):
        seconds = sum(float(part) * unit for part, unit in zip(match.groups("0"), UNITS.values(), strict=True))
        if 0 < seconds < math.inf:
            return seconds
    raise SeqmixError(f"{EXPECTED}, got {text!r}")


def format_duration(seconds: float) -> str:
    """Return a duration as `parse_duration` reads it: 5400 is 1h30m."""
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    parts = (f"{hours:.0f}h" if hours else "", f"{minutes:.0f}m" if minutes else "", f"{rest:.3g}s" if rest else "")
    return "".join(parts) or "0s"


def _validate(value: Any) -> Any:
    return parse_duration(value) if isinstance(value, str | int | float) else value


Duration = Annotated[
    float,
    BeforeValidator(_validate),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number", "exclusiveMinimum": 0}]}),
]
"""Field of a configuration with a duration; its value is in seconds."""
