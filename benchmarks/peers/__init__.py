"""The models that are compared: ours, the same by hand, and what is installed of other implementations."""

from .fla import Fla
from .gpt import GptEager, GptSdpa
from .llama import Llama, LlamaStatic
from .ours import ByHand, Seqmix
from .peer import Peer, Size
from .torchscale import TORCHSCALE

PEERS: tuple[type[Peer], ...] = (Seqmix, ByHand, *TORCHSCALE, Llama, LlamaStatic, GptSdpa, GptEager, Fla)
"""All of them; ratios are to the first that takes part."""

__all__ = ["PEERS", "Peer", "Seqmix", "Size"]
