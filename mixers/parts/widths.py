"""How wide one head is."""

import math
from bisect import bisect

from ..traits import ContractError


def head_width(d_model: int, expand: float, n_heads: int, name: str) -> int:
    """The width of one head of `expand * d_model` dimensions.

    Raises:
        ContractError: the heads do not divide it; it names the nearest numbers that would do.
    """
    return divided(d_model, expand, name, n_heads, "n_heads", f"{n_heads} heads do")


def divided(d_model: int, expand: float, name: str, divisor: int, field: str, subject: str) -> int:
    """`expand * d_model / divisor`, a whole number; `name` is the field of `expand`, `field` that of `divisor`,
    `subject` the beginning of the error.

    Raises:
        ContractError: it is not a whole number, or is 0; the error names the nearest values of a field that would do.
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
        f"{subject} not divide {name} * d_model = {expand:g} * {d_model} = {exact:g} evenly: {advice} would"
    )


def heads_of(d_model: int, expand: float, head_dim: int, n_groups: int) -> int:
    """The number of heads of width `head_dim` that `expand * d_model` dimensions have.

    Raises:
        ContractError: it is not a whole number, or the groups do not divide it; the error names the nearest that would.
    """
    n_heads = divided(d_model, expand, "expand", head_dim, "head_dim", f"heads of head_dim = {head_dim} do")
    if n_heads % n_groups:
        raise ContractError(
            f"n_groups = {n_groups} does not divide the {n_heads} heads of expand * d_model / head_dim: "
            f"n_groups = {nearest_of(divisors(n_heads), n_groups)} would"
        )
    return n_heads


def rotary_dim(share: float, head_dim: int) -> int:
    """The dimensions of a head that turn, in pairs.

    Raises:
        ContractError: `share * head_dim` is not even; it names the nearest shares that would do.
    """
    exact = share * head_dim
    dims = round(exact)
    if dims > 0 and dims % 2 == 0 and abs(dims - exact) <= 1e-6 * head_dim:
        return dims
    below = 2 * math.floor(exact / 2)
    near = " or ".join(f"{n / head_dim:.10g}" for n in (below, below + 2) if 0 < n <= head_dim)
    raise ContractError(
        f"partial_rotary_factor * head_dim = {share:g} * {head_dim} = {exact:g} dimensions are no pairs; {near} are"
    )


def divisors(number: int) -> list[int]:
    """What divides a positive number, in order."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def nearest_of(workable: list[int], given: int) -> str:
    """The nearest of the sorted numbers below and above the given one, in words; empty where there are none."""
    at = bisect(workable, given)
    return " or ".join(map(str, workable[max(0, at - 1) : at + 1]))
