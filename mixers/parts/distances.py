"""What the distance of a query and a key takes from their score, in ways that no token chooses."""

import torch
from jaxtyping import Float

XPOS_GAMMA = 0.4
XPOS_BASE = 512
"""Tokens after which a product has shrunk by zeta."""


def xpos_log_decay(head_dim: int, device: torch.device) -> Float[torch.Tensor, " K"]:
    """Natural log of xPos's factor per token of distance, float64, for interleaved pairs."""
    pair = torch.arange(head_dim // 2, device=device, dtype=torch.float64)
    zeta = (pair / (head_dim // 2) + XPOS_GAMMA) / (1 + XPOS_GAMMA)
    return (zeta.log() / XPOS_BASE).repeat_interleave(2)


def alibi_slopes(n_heads: int, device: torch.device) -> Float[torch.Tensor, " H"]:
    """What ALiBi takes from a score per token of distance (arXiv 2108.12409), float64.

    2^(-8 h / H) for h = 1 .. H if H is a power of 2. Else, as in the authors' code, the heads of the power below have
    its slopes, and the others every second one of the power above.
    """
    power = 2 ** (n_heads.bit_length() - 1)
    head = torch.arange(n_heads, device=device, dtype=torch.float64)
    return 2 ** -torch.where(head < power, 8 * (head + 1) / power, 8 * (head - power + 0.5) / power)
