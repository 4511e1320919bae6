"""Sequence mixers: the contract, and one file a mixer. A file whose config says `kind: Literal["<its name>"]` is a built-in."""

from .base import MIXERS, ContractError, MixerConfig, SequenceMixer, Traits
from .paradigm import Paradigm

__all__ = ["MIXERS", "ContractError", "MixerConfig", "Paradigm", "SequenceMixer", "Traits"]
