"""The models that are compared: seqmix, the same model written by hand, and other projects' models if installed."""

from .fla import Fla
from .gpt import GptEager, GptSdpa
from .llama import Llama, LlamaStatic
from .ours import ByHand, Int4, Int8, Reference, Seqmix
from .peer import Peer, Size
from .torchscale import TORCHSCALE

PEERS: tuple[type[Peer], ...] = (
    Seqmix,
    Int8,
    Int4,
    Reference,
    ByHand,
    *TORCHSCALE,
    Llama,
    LlamaStatic,
    GptSdpa,
    GptEager,
    Fla,
)
"""All peers; ratios are to the first of those that are measured."""

__all__ = ["PEERS", "Peer", "Seqmix", "Size"]
