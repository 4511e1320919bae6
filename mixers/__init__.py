"""Sequence mixers: the contract, and one file a mixer.

A file here is a built-in mixer if its config says `kind: Literal["<the file's name>"]`.
"""

from ..ops.paradigm import Paradigm
from .contract import MIXERS, ContractError, MixerConfig, SequenceMixer, Traits

__all__ = ["MIXERS", "ContractError", "MixerConfig", "Paradigm", "SequenceMixer", "Traits"]
