"""Widths of heads and numbers of heads, with errors that name the nearest workable values."""

import math
from bisect import bisect

from ..base.traits import ContractError


def head_width(d_model: int, expand: float, n_heads: int, name: str) -> int:
    """Return the width of a head if `expand * d_model` dimensions are split into `n_heads` heads.

    Raises:
        ContractError: the heads do not divide the dimensions; the message names the nearest numbers that do.
    """
    return divided(d_model, expand, name, n_heads, "n_heads", f"{n_heads} heads do")


def divided(d_model: int, expand: float, name: str, divisor: int, field: str, subject: str) -> int:
    """Return `expand * d_model / divisor`, which must be a whole number above 0.

    Args:
        d_model: width of the residual stream.
        expand: factor.
        name: name of the field that has `expand`.
        divisor: the divisor.
        field: name of the field that has `divisor`.
        subject: beginning of the error message, such as "3 heads do".

    Raises:
        ContractError: the result is not a whole number, or is 0; the message names the nearest values that work.
    """
    exact = d_model * expand
    total = round(exact)
    whole = total > 0 and abs(total - exact) <= 1e-6 * d_model
    if whole and total % divisor == 0:
        return total // divisor
    if whole:
        advice = f"{field} = {nearest_of(divisors(total), divisor)}"
    else:
        below = math.floor(exact / divisor)
        advice = f"{name} = {' or '.join(f'{n * divisor / d_model:.10g}' for n in (below, below + 1) if n)}"
    raise ContractError(
        f"{subject} not divide {name} * d_model = {expand:g} * {d_model} = {exact:g} evenly: set {advice}"
    )


def heads_of(d_model: int, expand: float, head_dim: int, n_groups: int) -> int:
    """Return the number of heads of width `head_dim` in `expand * d_model` dimensions.

    Raises:
        ContractError: the number is not whole, or the groups do not divide it; the message names the nearest values
            that work.
    """
    n_heads = divided(d_model, expand, "expand", head_dim, "head_dim", f"heads of head_dim = {head_dim} do")
    if n_heads % n_groups:
        raise ContractError(
            f"n_groups must divide the {n_heads} heads of expand * d_model / head_dim, got n_groups = {n_groups}: "
            f"set n_groups = {nearest_of(divisors(n_heads), n_groups)}"
        )
    return n_heads


def rotary_dim(share: float, head_dim: int) -> int:
    """Return the number of dimensions of a head that are rotated, `share * head_dim`.

    Raises:
        ContractError: the number is not even and above 0; the message names the nearest shares that work.
    """
    exact = share * head_dim
    dims = round(exact)
    if dims > 0 and dims % 2 == 0 and abs(dims - exact) <= 1e-6 * head_dim:
        return dims
    below = 2 * math.floor(exact / 2)
    shares = " or ".join(f"{n / head_dim:.10g}" for n in (below, below + 2) if 0 < n <= head_dim)
    raise ContractError(
        "partial_rotary_factor * head_dim must be an even number of dimensions, "
        f"got {share:g} * {head_dim} = {exact:g}: set partial_rotary_factor = {shares}"
    )


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, in ascending order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def nearest_of(workable: list[int], number: int) -> str:
    """Return the workable numbers nearest to a number, below and above it, as text: "4 or 8"; "" if there are none.

    Args:
        workable: the numbers that work, in ascending order.
        number: the number that does not work.
    """
    index = bisect(workable, number)
    return " or ".join(map(str, workable[max(0, index - 1) : index + 1]))
