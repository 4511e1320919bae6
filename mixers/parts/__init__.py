"""Components of mixers: a mixer of a known op family combines these and adds its own equations."""

from ...ops.recurrence.family import RecurrenceOutput
from ...ops.runtime.call import Call
from ...ops.runtime.paradigm import Paradigm
from ...registry.deprecated import former_names
from .cached import CachedMixer, ReaderState
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

__getattr__ = former_names(__name__, {"FixedDecay": "seqmix.mixers.retention.FixedDecay"})
