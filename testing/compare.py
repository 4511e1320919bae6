"""Compare tensors that should be equal: report how many elements differ, by how much, and where first."""

import cmath
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..mixers.base.state import is_inexact, to_dict

EXACT = 1e-9
"""Tolerance in float64: relative to an element, plus the same number times max(1, root mean square of the tensor).
A larger difference is an error of mathematics, not of rounding."""

LOW_PRECISION = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
"""Tolerances between a low-precision dtype and float64 on the same rounded numbers, relative to the norm: 5 units of
roundoff in 16 bits (2^-8 and 2^-11), 32 in float32 (2^-24). The worst error of the built-in mixers in thousands of
cases is half of that."""

GRADIENTS = 4
"""Tolerance of gradients as a multiple of the tolerance of outputs. A backward pass rounds about twice as often, and
its sums cancel more. The worst of 700 cases per built-in mixer is 3.75: linear attention with a denominator near 0."""


class CheckFailure(AssertionError):  # noqa: N818  test frameworks count it as a failure, not an error
    """A mixer or kernel lacks a property; the message says what differs and where."""


MAX_LINES = 5
"""Maximum number of tensors that a failure describes besides the first one."""


class Differences:
    """Context manager that compares tensors and, at its end, raises one `CheckFailure` that lists those that differ.

    Args:
        what: the comparison in words ("recurrent against parallel").
        tolerance: allowed difference, both relative and absolute; 0 requires equal bits.
        slack: further absolute difference allowed, by name of a tensor.
    """

    def __init__(self, what: str, tolerance: float = EXACT, slack: Mapping[str, float] | None = None) -> None:
        self.what, self.tolerance, self.slack = what, tolerance, slack or {}
        self.lines: list[str] = []

    def __enter__(self) -> "Differences":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.lines:
            first, *others = self.lines
            further = [f"  and {line}" for line in others[:MAX_LINES]]
            further += [f"  and {len(others) - MAX_LINES} more tensors"] if len(others) > MAX_LINES else []
            raise CheckFailure("\n".join([f"{self.what}: {first}", *further]))

    def tensor(self, name: str, actual: Tensor, expected: Tensor, axes: Sequence[str] = ()) -> None:
        """Compare shape, dtype, device and every element.

        Args:
            name: the tensor in words, for the report.
            actual: the tensor under test.
            expected: the tensor that it should equal.
            axes: names of the dimensions, one letter each ("BTD"), if they are known.
        """
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            self.lines.append(f"expected {name} to be {_dtype_and_shape(expected)}, got {_dtype_and_shape(actual)}")
        elif actual.device != expected.device:
            self.lines.append(f"expected {name} on {expected.device}, got it on {actual.device}")
        elif not torch.equal(actual, expected) and not self._within_absolute(actual, expected):
            tolerance = self.tolerance if is_inexact(actual) else 0
            slack = self.slack.get(name, 0.0)
            absolute = tolerance * max(1.0, _rms(expected)) + (slack if math.isfinite(slack) else 0.0)
            wrong = ~torch.isclose(actual, expected, rtol=tolerance, atol=absolute)
            self.lines += _describe_difference(
                name, actual, expected, wrong, axes, _describe_tolerance(tolerance, absolute)
            )

    def _within_absolute(self, actual: Tensor, expected: Tensor) -> bool:
        """Return True if every element is within the absolute tolerance: a quick test that most tensors pass."""
        return is_inexact(actual) and bool(((actual - expected).abs() <= self.tolerance).all())

    def close(
        self, name: str, actual: Tensor, exact: Tensor, dtype: torch.dtype, size: Tensor, axes: Sequence[str] = ()
    ) -> None:
        """Compare a result in any dtype with the exact one in float64; each element has a tolerance of its own.

        Args:
            name: the tensor in words, for the report.
            actual: the tensor under test.
            exact: the exact tensor, in float64.
            dtype: dtype that `actual` should have.
            size: for each element, the number that `tolerance` is multiplied by.
            axes: names of the dimensions, one letter each ("BTHV"), if they are known.
        """
        if actual.shape != exact.shape or actual.dtype != dtype:
            wanted = _dtype_and_shape(exact.to(dtype))
            self.lines.append(f"expected {name} to be {wanted}, got {_dtype_and_shape(actual)}")
            return
        result = actual.detach().to(exact.device, exact.dtype)
        wrong = ~((result - exact).abs() <= self.tolerance * size)  # negated, so that NaN is wrong
        allowed = f"{self.tolerance:.2g} of the sum of the absolute terms"
        self.lines += _describe_difference(name, result, exact, wrong, axes, allowed)

    def tensors(self, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
        """Compare output and gradients by name, as `Trial.differentiate` returns them."""
        for name, tensor in expected.items():
            self.tensor(name, actual[name], tensor, axes_of(name))

    def state(self, name: str, actual: Any, expected: Any) -> None:
        """Compare the class and every leaf of a state."""
        if type(actual) is not type(expected):
            self.lines.append(f"expected {name} to be a {type(expected).__name__}, got a {type(actual).__name__}")
            return
        if expected is None:
            return
        leaves, expected_leaves = to_dict(actual), to_dict(expected)
        for leaf in expected_leaves:
            self.tensor(f"{name}'s {leaf}", leaves[leaf], expected_leaves[leaf], _leaf_axes(expected, leaf))


FEW = 8
"""Number of elements below which the norm of a tensor means little: its sums over tokens may happen to cancel."""

ROUNDINGS = 2
"""Allowed error of a row, as a multiple of the change that rounding its inputs causes: a mixer rounds several times."""

MOVES = 8
"""Allowed error of a whole tensor, as a multiple of the change that rounding the tokens causes."""


def require_near(
    name: str,
    what: str,
    actual: Tensor,
    exact: Tensor,
    tolerance: float,
    *,
    floor: float = 0.0,
    row_moves: Callable[[str], Tensor] | None = None,
    perturbed: Callable[[], Tensor] | None = None,
) -> None:
    """Fail unless a low-precision tensor is finite and near the exact one.

    Every element has to be finite if the exact value fits the dtype. Three rows of four have to be within `tolerance`,
    relative to the mean norm of the rows. A row is a vector along the last dimension, such as a token of an output.
    Single rows may be far off: a norm over narrow heads divides by almost zero if a head's output is almost zero. A
    tensor of fewer than `FEW` elements need only be finite.

    Args:
        name: the tensor in words, for the report.
        what: the comparison in words.
        actual: the tensor in low precision.
        exact: the exact tensor.
        tolerance: allowed error of a row, relative to the mean norm of the rows.
        floor: root mean square per element of the smallest rows that errors are measured against; it replaces the mean
            norm of the rows if that norm is smaller.
        row_moves: takes the name of a tensor; returns, for each exact row, the norm of its change if its inputs are
            rounded. A row counts as right if its error is at most `ROUNDINGS` times as large.
        perturbed: returns the exact tensor for rounded tokens. The tolerance is at least `MOVES` times the relative
            distance of that tensor from `exact`.

    Raises:
        CheckFailure: the tensor is not near; the message has the first element that is not finite or, of an output,
            the step with the largest error.
    """
    if actual.shape != exact.shape:
        raise CheckFailure(f"{what}: expected {name} of shape {list(exact.shape)}, got {list(actual.shape)}")
    overflowed = exact.isfinite() & (exact.abs() <= torch.finfo(actual.dtype).max) & ~actual.isfinite()
    if lines := _describe_difference(name, actual.to(exact.dtype), exact, overflowed, axes_of(name), "finite"):
        raise CheckFailure(f"{what}: {lines[0]}")
    if exact.numel() < FEW:
        return
    error = (actual.to(exact.dtype) - exact).norm(dim=-1)
    size = max(exact.norm(dim=-1).mean().item(), floor * exact.shape[-1] ** 0.5)
    typical = _upper_quartile(error)
    if typical > tolerance * size and perturbed is not None:
        tolerance = max(tolerance, MOVES * ((perturbed() - exact).norm() / exact.norm().clamp(min=1e-30)).item())
    if typical > tolerance * size and row_moves is not None:
        error = torch.where(error <= ROUNDINGS * row_moves(name), 0, error)
        typical = _upper_quartile(error)
    if typical > tolerance * size:
        off = f"off by {typical / size:.1e} of its norm" if size else "not zero"
        step = f", most at step {error.amax(0).argmax().item()}" if axes_of(name) else ""
        raise CheckFailure(f"{what}: {name} is {off}{step} (allowed {tolerance:.1e})")


def _upper_quartile(error: Tensor) -> float:
    return error.flatten().nan_to_num(torch.inf).quantile(0.75).item()


def axes_of(name: str) -> str:
    """Return the dimensions of a tensor by its name in a mixer's report: "BTD" for output and input, "" for others."""
    return "BTD" if name.endswith(("the output", "the input")) else ""


def require(holds: bool | Tensor, sentence: str) -> None:
    """Raise a `CheckFailure` with this sentence unless the condition holds."""
    if not holds:
        raise CheckFailure(sentence)


def _describe_difference(
    name: str, actual: Tensor, expected: Tensor, wrong: Tensor, axes: Sequence[str], allowed: str
) -> list[str]:
    """Return one line, in a list, that says where elements are wrong and by how much; an empty list if none is.

    Args:
        name: the tensor in words.
        actual: the tensor under test.
        expected: the tensor that it should equal.
        wrong: True for each element that is wrong.
        axes: names of the dimensions, if they are known.
        allowed: the bound in words.
    """
    if not wrong.any():
        return []
    indices = wrong.nonzero()
    if "T" in axes:  # report the first step, not the first row
        indices = indices[indices[:, axes.index("T")].argsort(stable=True)]
    first = tuple(indices[0].tolist())
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
        bad = sorted(set(indices[:, axis].tolist()))
        heads = f", in head{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad))} of {actual.shape[axis]}"
    count = f"{wrong.sum().item()} of {wrong.numel()} elements{heads}"
    return [f"{name} differs at {_describe_index(first, axes)}: {values} ({off} in {count}; allowed: {allowed})"]


def _describe_tolerance(relative: float, absolute: float) -> str:
    if not relative and not absolute:
        return "equal bits"
    return f"{max(relative, absolute):.2g}"


def _describe_index(index: tuple[int, ...], axes: Sequence[str]) -> str:
    """Return an index in words, step and head first; as a list if the dimensions have no names."""
    names = {"T": "step", "H": "head", "B": "row", "N": "row", "D": "channel"}
    if len(axes) != len(index):
        return str(list(index))
    parts = [(names.get(axis, axis), i) for axis, i in zip(axes, index, strict=True)]
    parts.sort(key=lambda part: part[0] not in ("step", "head"))
    return ", ".join(f"{axis} {i}" for axis, i in parts)


def _leaf_axes(state: Any, leaf: str) -> list[str]:
    """Return the names of a leaf's dimensions, from the annotation of its field."""
    *path, field = leaf.split(".")
    for name in path:
        state = getattr(state, name) if hasattr(state, "_fields") else state[int(name)]
    annotation = get_type_hints(type(state)).get(field) if hasattr(state, "_fields") else None
    return getattr(annotation, "dim_str", "").split()


def _rms(x: Tensor) -> float:
    """Return the root mean square of a tensor's finite numbers; 0 for integers.

    Errors of rounding are relative to it: a small element may be the difference of large numbers.
    """
    finite = x.detach()[x.detach().isfinite()].abs().to(torch.float64) if is_inexact(x) else x.new_empty(0)
    return finite.square().mean().sqrt().item() if finite.numel() else 0.0


def _dtype_and_shape(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
