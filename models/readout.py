"""A readout of a whole sequence from one vector: the decoder of MAD's compression task (Poli et al. 2024, Mechanistic
Design and Scaling of Hybrid Architectures, arXiv 2403.17844).

    y_i = MLP(x_T + p_i)        p_i = (sin(i f_0), ..., cos(i f_0), ...)    f_j = 10000^(-j / (D/2 - 1))

where x_T is the residual stream at the last of T tokens, of width D. The MLP applies a norm, a linear layer and GELU,
twice.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..blocks.norm import NormConfig


class LastVector(nn.Module):
    """Readout that replaces every token's vector by a function of the last token's vector and the token's position."""

    def __init__(self, d_model: int, norm: NormConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm.build(d_model) for _ in range(2))  # pyright: ignore[reportArgumentType]
        self.layers = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(2))

    def reset_parameters(self) -> None:
        """Initialise every parameter."""
        for module in (*self.norms, *self.layers):
            module.reset_parameters()  # pyright: ignore[reportCallIssue]

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Return the vector of every position, computed from the vector of the last token."""
        length, width = x.shape[1:]
        half = -(-width // 2)
        indices = torch.arange(half, device=x.device, dtype=torch.float32)
        angles = torch.arange(length, device=x.device)[:, None] * 1e4 ** (-indices / max(half - 1, 1))
        y = x[:, -1:] + torch.cat((angles.sin(), angles.cos()), dim=-1)[:, :width].to(x.dtype)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = F.gelu(layer(norm(y)))
        return y
