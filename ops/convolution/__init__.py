"""Causal convolutions, short and long."""

from ...registry.deprecated import former_names
from .long import long_convolution
from .short import Activation, ConvolutionOutput, shift_tokens, short_convolution

__all__ = ["Activation", "ConvolutionOutput", "long_convolution", "shift_tokens", "short_convolution"]
__getattr__ = former_names(__name__, {"convolve_short": "short_convolution", "convolve_long": "long_convolution"})
