"""Scores that fall with the distance between query and key, independent of the tokens: xPos and ALiBi."""

import torch
from jaxtyping import Float

XPOS_GAMMA = 0.4
"""Offset gamma in zeta_j = (j / (K/2) + gamma) / (1 + gamma)."""
XPOS_BASE = 512
"""Distance in tokens at which a product has shrunk by the factor zeta."""


def xpos_log_decay(head_dim: int, device: torch.device) -> Float[torch.Tensor, " K"]:
    """Return the natural log of xPos's factor per token of distance, float64, for interleaved pairs."""
    pair = torch.arange(head_dim // 2, device=device, dtype=torch.float64)
    zeta = (pair / (head_dim // 2) + XPOS_GAMMA) / (1 + XPOS_GAMMA)
    return (zeta.log() / XPOS_BASE).repeat_interleave(2)


def alibi_slopes(n_heads: int, device: torch.device) -> Float[torch.Tensor, " H"]:
    """Return the ALiBi slope of each head, subtracted from a score per token of distance (arXiv 2108.12409), float64.

    The slopes are 2^(-8 h / H) for h = 1 .. H if H is a power of 2. Otherwise, as in the authors' code, with P the next
    lower power of 2, the first P heads have the slopes of P heads, and the others have every second slope of 2 P heads.
    """
    power = 2 ** (n_heads.bit_length() - 1)
    head = torch.arange(n_heads, device=device, dtype=torch.float64)
    return 2 ** -torch.where(head < power, 8 * (head + 1) / power, 8 * (head - power + 0.5) / power)
