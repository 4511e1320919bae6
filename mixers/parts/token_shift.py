"""Token shift: the previous token of each token, across segments, packed documents and processes."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...ops.convolution import ConvolutionOutput, shift_tokens
from ...ops.runtime.call import Call
from ..roles import Role, Roles


def token_shift(x: Float[Tensor, "B T C"], before: Float[Tensor, "N 1 C"] | None, call: Call) -> ConvolutionOutput:
    """Return x_{t-1} for every token, and the last token of each row or document, [N 1 C] (None unless requested).

    Args:
        x: the segment.
        before: the token before the first token of each row or document; None for zeros.
        call: the mixer's call; its state is not used.
    """
    return shift_tokens(x, call._replace(state=before))


class TokenShift(nn.Module):
    """Mixtures of each token with the previous one, x_t + mu * (x_{t-1} - x_t), with several mu per channel.

    Args:
        width: number of channels.
        powers: exponent p of each mixture, whose mu starts at 1 - (channel / width)^p.
    """

    parameter_roles: ClassVar[Roles] = {"weight": Role.VECTOR}

    def __init__(self, width: int, powers: Sequence[float]) -> None:
        super().__init__()
        self.powers = tuple(powers)
        self.weight = nn.Parameter(torch.empty(len(powers), width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise mu as 1 - (channel / width)^p, with the exponent p of each mixture."""
        width = self.weight.shape[1]
        channel = torch.arange(width, device=self.weight.device, dtype=torch.float64) / width
        for mu, power in zip(self.weight, self.powers, strict=True):
            mu.copy_(1 - channel**power)

    def forward(
        self, x: Float[Tensor, "B T C"], call: Call
    ) -> tuple[Float[Tensor, "mixtures B T C"], Float[Tensor, "N 1 C"] | None]:
        """Return all mixtures of a segment, and its last token in the parameters' dtype as the state."""
        before = x.new_zeros(call.rows(x.shape[0]), 1, x.shape[2]) if call.state is None else call.state
        shifted, last = token_shift(x, before, call)
        mixed = torch.lerp(x, shifted, self.weight[:, None, None].to(x.dtype))
        return mixed, None if last is None else last.to(self.weight.dtype)

    def init_state(self, batch_size: int) -> Float[Tensor, "B 1 C"]:
        """Return the initial state, zeros."""
        return self.weight.new_zeros(batch_size, 1, self.weight.shape[1])
