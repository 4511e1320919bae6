"""Causal convolutions, short and long."""

from .long import convolve_long, long_convolution
from .short import ConvolutionOutput, convolve_short, shift_tokens, short_convolution

__all__ = ["ConvolutionOutput", "convolve_long", "convolve_short", "long_convolution"]
__all__ += ["shift_tokens", "short_convolution"]
