"""Rotary positions: queries and keys are rotated by angles that grow with the position.

Angles are computed in float64 and then cast: a float32 angle is off by 2e-2 at position 1e6.

    frequencies:  rope    theta_j = base ** (-j / (K/2)),        j = 0 .. K/2-1     (RoFormer, arXiv 2104.09864)
                  retnet  theta_j = base ** (-j / (K/2 - 1))                        (the RetNet authors' code)
    rotation:     (x_2j, x_2j+1) is rotated by the angle position * theta_j        (pairs are interleaved)
"""

import math
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from pydantic import Field
from torch import Tensor

from ...ops.runtime.memo import Memo, once
from ...registry import Config

Schedule = Literal["rope", "retnet"]


class LinearScaling(Config):
    """Linear scaling: all angles are divided by a factor, which extends the context (arXiv 2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(gt=0)
    """Divisor of the angles."""


class Llama3Scaling(Config):
    """Scaling of Llama 3.1: slow rotations are divided by a factor, fast ones stay, and those between are interpolated.

    theta <- s theta + (1 - s) theta / factor     s = (r - low) / (high - low) within [0, 1], r = length theta / (2 pi)
    """

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(gt=0)
    """Divisor of the slow rotations."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """A rotation is slow if it makes at most this number of turns within the original length."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """A rotation is fast if it makes at least this number of turns within the original length."""
    original_length: int = Field(default=8192, gt=0)
    """Context length in tokens before the extension."""


RopeScaling = Annotated[LinearScaling | Llama3Scaling, Field(discriminator="kind")]


def scale_angles(theta: Float[Tensor, " K/2"], scaling: LinearScaling | Llama3Scaling | None) -> Float[Tensor, " K/2"]:
    """Scale angles for an extended context; None leaves them unchanged."""
    if scaling is None:
        return theta
    if isinstance(scaling, LinearScaling):
        return theta / scaling.factor
    low = scaling.low_freq_factor
    high = scaling.high_freq_factor
    share = ((scaling.original_length * theta / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    return torch.lerp(theta / scaling.factor, theta, share)


def frequencies(head_dim: int, schedule: Schedule, base: float, device: torch.device) -> Float[Tensor, " K/2"]:
    """Return the angle per token of each pair of a head's dimensions, in radians, float64."""
    pairs = head_dim // 2
    # the authors' schedule includes both ends of the exponent's range
    steps = pairs if schedule == "rope" else max(pairs - 1, 1)
    return torch.pow(base, torch.arange(pairs, device=device, dtype=torch.float64) / -steps)


def rotated(
    x: Float[Tensor, "B T H K"],
    positions: Int[Tensor, "_ T"],
    schedule: Schedule,
    base: float,
    dims: int | None = None,
    scaling: LinearScaling | Llama3Scaling | None = None,
    memo: Memo | None = None,
) -> Float[Tensor, "B T H K"]:
    """Rotate heads by the angles of their positions.

    Args:
        x: the heads.
        positions: position of each token.
        schedule: formula of the frequencies.
        base: base of the frequencies.
        dims: number of dimensions to rotate, counted from the first; None for all.
        scaling: scaling of the angles; None for none.
        memo: cache in which a layer finds the angles that an earlier layer computed; None to compute them.
    """
    if dims is not None and dims < x.shape[-1]:
        rotated_dims = rotated(x[..., :dims], positions, schedule, base, None, scaling, memo)
        return torch.cat((rotated_dims, x[..., dims:]), dim=-1)
    theta = once(memo, frequencies, x.shape[-1], schedule, base, positions.device)
    wide = torch.promote_types(x.dtype, torch.float32)
    return rotate(x, once(memo, _rotation_at, positions, theta, scaling, wide))


def _rotation_at(
    positions: Tensor, theta: Tensor, scaling: LinearScaling | Llama3Scaling | None, dtype: torch.dtype
) -> "Rotation":
    angles = rotation(positions, scale_angles(theta, scaling), dtype)
    return angles if torch.compiler.is_compiling() else angles._replace(unit=torch.complex(angles.cos, angles.sin))


class Rotation(NamedTuple):
    """Cosine and sine of the angles of a segment, for all heads."""

    cos: Float[Tensor, "_ T 1 K/2"]
    sin: Float[Tensor, "_ T 1 K/2"]
    unit: Complex[Tensor, "_ T 1 K/2"] | None = None
    """cos + i sin, if it is precomputed."""


def rotation(positions: Int[Tensor, "B T"], theta: Float[Tensor, " K/2"], dtype: torch.dtype) -> Rotation:
    """Return the cosine and sine of every token's angles."""
    angles = positions[:, :, None, None] * theta
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Float[Tensor, "B T H K"], by: Rotation) -> Float[Tensor, "B T H K"]:
    """Turn each interleaved pair (a, b) of dimensions to (a cos - b sin, b cos + a sin), in the angles' dtype."""
    dtype = x.dtype
    wide = torch.promote_types(x.dtype, by.cos.dtype)
    x = x if dtype == wide else x.to(wide)  # a cast to the same dtype still costs a call
    pairs = torch.unflatten(x, -1, (-1, 2))
    # one complex product takes a third of the time of real ones; compilers fuse real ones and do not support complex
    if not torch.compiler.is_compiling() and _is_complex_view(x):
        unit = torch.complex(by.cos, by.sin) if by.unit is None else by.unit
        rotated_pairs = torch.view_as_real(torch.view_as_complex(pairs) * unit).flatten(-2)
    else:
        cos, sin = (torch.stack(pair, dim=-1).flatten(-2) for pair in ((by.cos, by.cos), (-by.sin, by.sin)))
        rotated_pairs = torch.addcmul(x * cos, pairs.flip(-1).flatten(-2), sin)
    return rotated_pairs if dtype == wide else rotated_pairs.to(dtype)


def _is_complex_view(x: Tensor) -> bool:
    """True if pairs of x can be viewed as complex numbers without a copy."""
    *outer, inner = x.stride()
    even = math.gcd(x.storage_offset(), *outer) % 2 == 0
    return even and inner == 1 and x.dtype in (torch.float32, torch.float64)
