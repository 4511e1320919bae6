"""Sequence mixers: the contract, and one file per mixer.

A file here is a built-in mixer if its config says `kind: Literal["<the file's name>"]`; parts/ is what they share.
"""

from ..ops.runtime.call import Call
from ..ops.runtime.paradigm import Paradigm
from .contract import MIXERS, MixerConfig, SequenceMixer
from .traits import ContractError, Traits

__all__ = ["MIXERS", "Call", "ContractError", "MixerConfig", "Paradigm", "SequenceMixer", "Traits"]
