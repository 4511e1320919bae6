"""What mixers are made of: a mixer of a known family takes these and states its equations."""

from .gates import Gate, GatedNorm, HeadNorm, LowRank
from .matrix_state import MatrixState, MatrixStateConfig, MatrixStateMixer
from .qkv import QKV, QKVConfig, QKVMixer
from .rotary import Schedule, rotated
from .short_convolution import ShortConvolution
from .time_step import TimeStepDecay, in_range
from .widths import divided, divisors, head_width, nearest_of

__all__ = [
    "QKV",
    "Gate",
    "GatedNorm",
    "HeadNorm",
    "LowRank",
    "MatrixState",
    "MatrixStateConfig",
    "MatrixStateMixer",
    "QKVConfig",
    "QKVMixer",
    "Schedule",
    "ShortConvolution",
    "TimeStepDecay",
    "divided",
    "divisors",
    "head_width",
    "in_range",
    "nearest_of",
    "rotated",
]
