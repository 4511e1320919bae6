"""Sequence mixers: the contract, and one file per mixer.

A file of this folder is a built-in mixer if its configuration declares `kind: Literal["<the file's name>"]`. parts/ has
the components that several mixers share.
"""

from ..ops.runtime.call import Call
from ..ops.runtime.paradigm import Paradigm
from .base.contract import MIXERS, MixerConfig, SequenceMixer
from .base.layer_call import LayerCall, MixResult
from .base.roles import Role, RowBlock
from .base.traits import ContractError, Traits

__all__ = [
    "MIXERS",
    "Call",
    "ContractError",
    "LayerCall",
    "MixResult",
    "MixerConfig",
    "Paradigm",
    "Role",
    "RowBlock",
    "SequenceMixer",
    "Traits",
]
