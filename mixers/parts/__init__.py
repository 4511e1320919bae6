"""Components of mixers: a mixer of a known op family combines these and adds its own equations."""

from ...ops.recurrence.family import RecurrenceOutput
from ...ops.runtime.call import Call
from ...ops.runtime.paradigm import Paradigm
from .cached import CachedMixer, ReaderState
from .decay_rates import FixedDecay
from .gates import Gate, GatedNorm, HeadNorm, LowRank
from .matrix_state import MatrixState, MatrixStateConfig, MatrixStateMixer, ShortConv
from .qk_norm import QKNorm
from .qkv import QKV, QKVConfig, QKVMixer
from .rotary import Schedule, rotated
from .short_convolution import ShortConvolution
from .time_step import TimeStepDecay, TimeStepFields
from .widths import divided, divisors, head_width, nearest_of

__all__ = [
    "QKV",
    "CachedMixer",
    "Call",
    "FixedDecay",
    "Gate",
    "GatedNorm",
    "HeadNorm",
    "LowRank",
    "MatrixState",
    "MatrixStateConfig",
    "MatrixStateMixer",
    "Paradigm",
    "QKNorm",
    "QKVConfig",
    "QKVMixer",
    "ReaderState",
    "RecurrenceOutput",
    "Schedule",
    "ShortConv",
    "ShortConvolution",
    "TimeStepDecay",
    "TimeStepFields",
    "divided",
    "divisors",
    "head_width",
    "nearest_of",
    "rotated",
]
