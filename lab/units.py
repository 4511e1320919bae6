"""Short formats of numbers, and units that suit their size."""

SI = ("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12), ("P", 1e15), ("E", 1e18)
UNITS = {
    "bytes": (("B", 1.0), ("KiB", 2.0**10), ("MiB", 2.0**20), ("GiB", 2.0**30), ("TiB", 2.0**40)),
    "seconds": (("ns", 1e-9), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("min", 60.0), ("h", 3600.0)),
    "share": (("%", 0.01),),
}
"""Units by quantity, smallest first: name, and value in bytes, seconds or shares."""


def choose_unit(unit: str, size: float) -> tuple[str, float]:
    """Return the name and the value of the unit that suits a size; an unknown unit is returned with the value 1."""
    units = UNITS.get(unit, ((unit, 1.0),))
    return next((pair for pair in reversed(units) if size >= 0.999 * pair[1]), units[0])


def number(value: float) -> str:
    """Format a number briefly, with SI prefixes from 10,000 on: 0.25, 2,000, 200k, 1.5M, 3e-4."""
    if 0 < abs(value) < 1e-3:
        digits, _, exponent = f"{value:.1e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}"
    prefix, unit = next(pair for pair in reversed(SI) if abs(value) >= 0.9995 * pair[1]) if abs(value) >= 1e4 else SI[0]
    return f"{value / unit:.3g}{prefix}" if abs(value) / unit < 1000 else f"{value / unit:,.0f}{prefix}"


def quantity(value: float | None, unit: str) -> str:
    """Format bytes, seconds or a share in the unit that suits the value; empty for None."""
    if value is None:
        return ""
    name, size = choose_unit(unit, value)
    return f"{value / size:.3g} {name}" if value / size < 1000 else f"{value / size:,.0f} {name}"


def three_digits(value: float) -> str:
    """Format a number of at least 0 with about three significant digits: 0.123, 1.23, 12.3, 1,234."""
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def plus_minus(value: float, margin: float | None, digits: int, *, as_percent: bool = False) -> str:
    """Format a value with the margin of its interval, in percent if `as_percent`: 84.0 ± 6.4 %."""
    scale, unit = (100, " %") if as_percent else (1, "")
    return f"{scale * value:.{digits}f}" + ("" if margin is None else f" ± {scale * margin:.{digits}f}") + unit


def si(value: float) -> str:
    """Format a number with a decimal prefix, to which a unit is appended: "1.2 M"."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} Z"


def si_bytes(value: float) -> str:
    """Format a number of bytes with a binary prefix: "1.2 MiB"."""
    for prefix in ("", "Ki", "Mi", "Gi"):
        if abs(value) < 1024:
            return f"{value:.4g} {prefix}B"
        value /= 1024
    return f"{value:.4g} TiB"
