"""A readout of a whole sequence from one vector: the decoder of MAD's compression task (Poli et al. 2024, Mechanistic
Design and Scaling of Hybrid Architectures, arXiv 2403.17844).

    y_i = MLP(x_T + p_i)        p_i = (sin(i f_0), ..., cos(i f_0), ...)    f_j = 10000^(-j / (D/2 - 1))

with x_T the residual stream at the last of T tokens, of width D. The MLP is a norm, a linear layer and GELU, twice.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..blocks.norm import NormConfig


class LastVector(nn.Module):
    """The residual stream of every token, made from that of the last one and the tokens' positions."""

    def __init__(self, d_model: int, norm: NormConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm.build(d_model) for _ in range(2))  # pyright: ignore[reportArgumentType]
        self.layers = nn.ModuleList(nn.Linear(d_model, d_model) for _ in range(2))

    def reset_parameters(self) -> None:
        """Initialise every parameter."""
        for module in (*self.norms, *self.layers):
            module.reset_parameters()  # pyright: ignore[reportCallIssue]

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Every token's vector from the last one's."""
        length, width = x.shape[1:]
        half = -(-width // 2)
        places = torch.arange(half, device=x.device, dtype=torch.float32)
        angles = torch.arange(length, device=x.device)[:, None] * 1e4 ** (-places / max(half - 1, 1))
        y = x[:, -1:] + torch.cat((angles.sin(), angles.cos()), dim=-1)[:, :width].to(x.dtype)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = F.gelu(layer(norm(y)))
        return y
