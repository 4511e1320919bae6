"""Differences between tensors that should be equal: how many elements, by how much, and where first."""

import cmath
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..mixers.state import is_inexact, to_dict

EXACT = 1e-9
"""Allowed in float64, relative to an element, and absolute, or relative to the tensor's root mean square where that is
above 1: what is beyond is an error of mathematics, not of rounding."""

LOW_PRECISION = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
"""Allowed between a dtype and float64 on the same rounded numbers, relative to the norm: 5 units of roundoff (2^-8 and
2^-11), and 32 of float32 (2^-24). The worst of the built-in mixers in thousands of cases is half of it."""

GRADIENTS = 4
"""Gradients may be off by so many times what outputs may: a backward pass rounds about twice as often, and its sums
cancel more. The worst of 700 cases of each built-in mixer came to 3.75: linear attention, its denominator almost
zero."""


class CheckFailure(AssertionError):  # noqa: N818  a failure, as test frameworks count them, not an error
    """A mixer or kernel lacks a property; the message says which and where."""


MOST_LINES = 5
"""Tensors beside the first of which a failure says how they differ."""


class Differences:
    """Collects what differs, so that one failure names every tensor that is wrong.

    `what` is compared with what ("recurrent against parallel"). The tolerance is relative and absolute, 0 bit for bit;
    `slack` is allowed beside it, absolute, by name of a tensor.
    """

    def __init__(self, what: str, tolerance: float = EXACT, slack: Mapping[str, float] | None = None) -> None:
        self.what, self.tolerance, self.slack = what, tolerance, slack or {}
        self.lines: list[str] = []

    def __enter__(self) -> "Differences":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.lines:
            first, *others = self.lines
            more = [f"  and {line}" for line in others[:MOST_LINES]]
            more += [f"  and {len(others) - MOST_LINES} more tensors"] if len(others) > MOST_LINES else []
            raise CheckFailure("\n".join([f"{self.what}: {first}", *more]))

    def tensor(self, name: str, actual: Tensor, expected: Tensor, axes: Sequence[str] = ()) -> None:
        """Shape, dtype and every element; `axes` name the dimensions where they are known."""
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            self.lines.append(f"expected {name} to be {_kind(expected)}, got {_kind(actual)}")
        elif actual.device != expected.device:
            self.lines.append(f"expected {name} on {expected.device}, got it on {actual.device}")
        elif not torch.equal(actual, expected) and not self._near(actual, expected):
            tolerance = self.tolerance if is_inexact(actual) else 0
            slack = self.slack.get(name, 0.0)
            absolute = tolerance * max(1.0, _size(expected)) + (slack if math.isfinite(slack) else 0.0)
            wrong = ~torch.isclose(actual, expected, rtol=tolerance, atol=absolute)
            self.lines += _difference(name, actual, expected, wrong, axes, _allowed(tolerance, absolute))

    def _near(self, actual: Tensor, expected: Tensor) -> bool:
        """True if no element is further off than is allowed of the smallest: most are not, which is quickly seen."""
        return is_inexact(actual) and bool(((actual - expected).abs() <= self.tolerance).all())

    def close(
        self, name: str, actual: Tensor, exact: Tensor, dtype: torch.dtype, size: Tensor, axes: Sequence[str] = ()
    ) -> None:
        """A result of any dtype against the exact one in float64: the tolerance is relative to `size`, by element."""
        if actual.shape != exact.shape or actual.dtype != dtype:
            self.lines.append(f"expected {name} to be {_kind(exact.to(dtype))}, got {_kind(actual)}")
            return
        result = actual.detach().to(exact.device, exact.dtype)
        wrong = ~((result - exact).abs() <= self.tolerance * size)  # a nan is wrong
        allowed = f"{self.tolerance:.2g} of the sum of the absolute terms"
        self.lines += _difference(name, result, exact, wrong, axes, allowed)

    def tensors(self, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """Output and gradients by name, as `Trial.differentiate` gives them."""
        for name, tensor in expected.items():
            self.tensor(name, actual[name], tensor, axes_of(name))

    def state(self, name: str, actual: Any, expected: Any) -> None:
        """Every leaf of a state."""
        if type(actual) is not type(expected):
            self.lines.append(f"expected {name} to be a {type(expected).__name__}, got a {type(actual).__name__}")
            return
        if expected is None:
            return
        found, wanted = to_dict(actual), to_dict(expected)
        for leaf in wanted:
            self.tensor(f"{name}'s {leaf}", found[leaf], wanted[leaf], _axes(expected, leaf))


FEW = 8
"""Numbers below which a tensor has no norm to speak of: a sum over tokens may happen to cancel."""

ROUNDINGS = 2
"""How much further than its inputs' rounding moves it a row may be off: a mixer rounds in several places."""

MOVES = 8
"""The same of all of a tensor."""


def near(
    name: str,
    what: str,
    actual: Tensor,
    exact: Tensor,
    tolerance: float,
    *,
    floor: float = 0.0,
    moved: Callable[[str], Tensor] | None = None,
    shifted: Callable[[], Tensor] | None = None,
) -> None:
    """Refuse a low-precision tensor that is not finite where it could be, or of which a quarter of the rows (along the
    last dimension; of an output, a token's) is further off than `tolerance`, relative to the rows' mean norm.

    Single rows may be far off: a norm of narrow heads divides by almost zero where a head's output is almost zero. A
    few numbers need only be finite. `floor` is a root mean square of an element below which nothing can be
    distinguished from zero. `moved` gives, by name, how far each row of the exact tensor moves where what it is
    computed from is rounded: a row that is off by no more than `ROUNDINGS` times as much does not count. `shifted`
    gives the exact tensor of rounded tokens: what is off by no more than `MOVES` times as much is as near as it can be.

    Raises:
        CheckFailure: it is; the first element that is not finite, or of an output the step furthest off, is named.
    """
    if actual.shape != exact.shape:
        raise CheckFailure(f"{what}: expected {name} of shape {list(exact.shape)}, got {list(actual.shape)}")
    lost = exact.isfinite() & (exact.abs() <= torch.finfo(actual.dtype).max) & ~actual.isfinite()
    if lines := _difference(name, actual.to(exact.dtype), exact, lost, axes_of(name), "finite"):
        raise CheckFailure(f"{what}: {lines[0]}")
    if exact.numel() < FEW:
        return
    error = (actual.to(exact.dtype) - exact).norm(dim=-1)
    size = max(exact.norm(dim=-1).mean().item(), floor * exact.shape[-1] ** 0.5)
    typical = _typical(error)
    if typical > tolerance * size and shifted is not None:
        tolerance = max(tolerance, MOVES * ((shifted() - exact).norm() / exact.norm().clamp(min=1e-30)).item())
    if typical > tolerance * size and moved is not None:
        error = torch.where(error <= ROUNDINGS * moved(name), 0, error)
        typical = _typical(error)
    if typical > tolerance * size:
        off = f"off by {typical / size:.1e} of its norm" if size else "not zero"
        step = f", most at step {error.amax(0).argmax().item()}" if axes_of(name) else ""
        raise CheckFailure(f"{what}: {name} is {off}{step} (allowed {tolerance:.1e})")


def _typical(error: Tensor) -> float:
    return error.flatten().nan_to_num(torch.inf).quantile(0.75).item()


def axes_of(name: str) -> str:
    """The dimensions of what a mixer's report names so, where they are known."""
    return "BTD" if name.endswith(("the output", "the input")) else ""


def require(holds: bool | Tensor, sentence: str) -> None:
    """Raise a `CheckFailure` of this sentence if it does not hold."""
    if not holds:
        raise CheckFailure(sentence)


def _difference(
    name: str, actual: Tensor, expected: Tensor, wrong: Tensor, axes: Sequence[str], allowed: str
) -> list[str]:
    """The line that says where, what was expected, and how much over which bound; none if nothing is wrong."""
    if not wrong.any():
        return []
    where = wrong.nonzero()
    if "T" in axes:  # the first step, not the first row
        where = where[where[:, axes.index("T")].argsort(stable=True)]
    first = tuple(where[0].tolist())
    distance = (actual - expected).abs() if is_inexact(actual) else (actual != expected).to(torch.float64)
    largest = distance[wrong].nan_to_num(torch.inf, posinf=torch.inf).max().item()
    got, wanted = actual[first].item(), expected[first].item()
    digits = 6 if f"{got:.6g}" != f"{wanted:.6g}" else 17
    values = f"expected {wanted:.{digits}g}, got {got:.{digits}g}"
    if not any(map(cmath.isfinite, (got, wanted))):
        values = "not finite on either side"
    if not first:
        return [f"{name} differs: {values} (allowed: {allowed})"]
    off = f"off by up to {largest:.2g}" if largest < torch.inf else "with values that are not finite"
    heads = ""
    if "H" in axes:
        axis = axes.index("H")
        bad = sorted(set(where[:, axis].tolist()))
        heads = f", in head{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad))} of {actual.shape[axis]}"
    count = f"{wrong.sum().item()} of {wrong.numel()} elements{heads}"
    return [f"{name} differs at {_place(first, axes)}: {values} ({off} in {count}; allowed: {allowed})"]


def _allowed(relative: float, absolute: float) -> str:
    if not relative and not absolute:
        return "equal bits"
    return f"{max(relative, absolute):.2g}"


def _place(index: tuple[int, ...], axes: Sequence[str]) -> str:
    names = {"T": "step", "H": "head", "B": "row", "N": "row", "D": "channel"}
    if len(axes) != len(index):
        return str(list(index))
    parts = [(names.get(axis, axis), i) for axis, i in zip(axes, index, strict=True)]
    parts.sort(key=lambda part: part[0] not in ("step", "head"))
    return ", ".join(f"{axis} {i}" for axis, i in parts)


def _axes(state: Any, leaf: str) -> list[str]:
    """The names of a leaf's dimensions, from the annotation of its field."""
    *path, field = leaf.split(".")
    for name in path:
        state = getattr(state, name) if hasattr(state, "_fields") else state[int(name)]
    annotation = get_type_hints(type(state)).get(field) if hasattr(state, "_fields") else None
    return getattr(annotation, "dim_str", "").split()


def _size(x: Tensor) -> float:
    """The root mean square of the finite numbers: what is left where large ones cancel is rounded as they are."""
    finite = x.detach()[x.detach().isfinite()].abs().to(torch.float64) if is_inexact(x) else x.new_empty(0)
    return finite.square().mean().sqrt().item() if finite.numel() else 0.0


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
