"""Number formats of a state: a value is rounded to the format and widened again, so the recurrence stays in float32.

    floating point   Q(x) = the nearest number of the format
    integers         Q(x) = q s,   q = round(x / s),   s = max |x| / (2^(b-1) - 1) over the numbers that share a scale

Rounding a rounded tensor again changes nothing: s is rounded down to 16 significant bits, so the largest number of a
scale always has the largest code, and q s is exact in float32 and gives s back.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from ...registry import require_name


class Format(NamedTuple):
    """A number format."""

    bits: int
    dtype: torch.dtype | None = None
    """Floating-point dtype; None for integers with a scale."""


FORMATS = {
    "float32": Format(32, torch.float32),
    "bfloat16": Format(16, torch.bfloat16),
    "float16": Format(16, torch.float16),
    "int8": Format(8),
    "int4": Format(4),
}
"""Formats by name. float32 rounds only what a mixer keeps in float64: angles, and sums of logarithms."""
Rounding: TypeAlias = Literal["nearest", "stochastic", "compensated"]
"""Nearest number (ties to even); up or down at random, so that the mean is right; or to nearest after the error of the
previous rounding is added (error feedback), which stores this error as well and so doubles the memory."""
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
Scales: TypeAlias = Literal["channel", "head"]
"""Numbers of an integer format that share a scale: those along the last dimension (a key channel of a matrix state, a
head's key in a KV cache), or those of a head (all dimensions after the second)."""
MIN_SHARED = 8
"""Minimum number of values of a channel: a shorter last dimension (such as real and imaginary parts) is joined with the
one before it."""
SCALE_BITS = 32
"""Bits of a scale, a float32 number."""
_SMALLEST_SCALE = 2.0**-100
"""Minimum scale, far from the subnormal numbers of float32, in which products would be rounded."""


@dataclass(frozen=True)
class StateFormat:
    """Format in which the numbers of a state are stored.

    Raises:
        SeqmixError: the format, the rounding or the kind of scales does not exist.
    """

    format: str
    """Name in `FORMATS`."""
    rounding: Rounding = "nearest"
    scales: Scales = "channel"

    def __post_init__(self) -> None:
        require_name("number format", self.format, FORMATS)
        require_name("rounding", self.rounding, ROUNDINGS)
        require_name("kind of scales", self.scales, get_args(Scales))

    def __str__(self) -> str:
        return self.format if self.rounding == "nearest" else f"{self.format}, {self.rounding}"

    @property
    def bits(self) -> int:
        """Bits per number without scales; twice those of the format if the rounding error is stored too."""
        return FORMATS[self.format].bits * (2 if self.rounding == "compensated" else 1)

    def stored_bits(self, shape: torch.Size, *, written_once: bool = False) -> int:
        """Return the bits of a tensor in this format, scales included; entries that are `written_once` have no error
        to carry along."""
        bits, dtype = FORMATS[self.format]
        groups = 0 if dtype else math.prod(shape) // max(1, math.prod(shape[dim] for dim in self._shared(shape)))
        total = math.prod(shape) * bits + groups * SCALE_BITS
        return total * 2 if self.rounding == "compensated" and not written_once else total

    def round(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return x rounded to the format, in its own dtype; infinities and NaN stay.

        Args:
            x: a real tensor [B ...].
            generator: source of the random numbers of stochastic rounding; None for torch's default one.
        """
        if x.numel() == 0:
            return x
        dtype = FORMATS[self.format].dtype
        if dtype is None:
            return self._round_to_codes(x, generator)
        if self.rounding != "stochastic" or dtype is torch.float32:  # float32 has no digits left for a random number
            return x.to(dtype).to(x.dtype)
        wide = x.float()
        info = torch.finfo(dtype)
        power = (wide.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2 |x|): sign and digits cleared
        # distance between neighbours of the format: constant below its smallest normal number
        spacing = (power * info.eps).clamp(min=info.smallest_normal * info.eps)
        rounded = (self._whole(wide / spacing, generator) * spacing).to(dtype).to(x.dtype)
        return torch.where(wide.isfinite(), rounded, x)

    def _round_to_codes(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        largest = 2 ** (FORMATS[self.format].bits - 1) - 1
        wide = x.float()
        shared = self._shared(x.shape)
        size = torch.linalg.vector_norm(wide, math.inf, shared, keepdim=True) if shared else wide.abs()
        infinite = None
        if not size.isfinite().all():
            infinite = ~wide.isfinite()
            wide = wide.masked_fill(infinite, 0.0)
            size = wide.abs().amax(shared, keepdim=True) if shared else wide.abs()
        # 16 significant bits, rounded down: the last 8 of the 24 are cleared
        scale = ((size / largest).view(torch.int32) & ~0xFF).view(torch.float32).clamp(min=_SMALLEST_SCALE)
        codes = self._whole(wide / scale, generator)
        if self.rounding == "stochastic":  # the largest number lies a little above its code
            codes.clamp_(-largest, largest)
        rounded = codes.mul_(scale)
        return (rounded if infinite is None else torch.where(infinite, x, rounded)).to(x.dtype)

    def _whole(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Round to whole numbers, in place."""
        if self.rounding != "stochastic":
            return x.round_()
        # 12 random bits: added to a whole number below 2^12, they never round up to the next one
        random = torch.randint(4096, x.shape, generator=generator, device=x.device)
        return x.add_(random / 4096).floor_()

    def _shared(self, shape: torch.Size) -> tuple[int, ...]:
        """Return the dimensions along which numbers share a scale; none for a tensor [B]."""
        if len(shape) == 1:
            return ()
        head = min(2, len(shape) - 1)
        first = head if self.scales == "head" else len(shape) - 1
        while first > head and math.prod(shape[first:]) < MIN_SHARED:
            first -= 1
        return tuple(range(first, len(shape)))
