"""Token shift: the previous token of each token, across segments, packed documents and processes."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...ops.convolution import ConvolutionOutput, shift_tokens
from ...ops.runtime.call import Call
from ..base.roles import Role, Roles
from ..base.traits import ContractError


def token_shift(x: Float[Tensor, "B T C"], before: Float[Tensor, "N 1 C"] | None, call: Call) -> ConvolutionOutput:
    """Return x_{t-1} for every token, and the last token of each row or document, [N 1 C] (None unless requested).

    Args:
        x: the segment.
        before: the token before the first token of each row or document; None for zeros.
        call: the mixer's call; its state is not used.

    Raises:
        ContractError: the two have different widths.
    """
    if before is not None and before.shape[-1] != x.shape[-1]:
        raise ContractError(f"expected x of width {before.shape[-1]}, got {x.shape[-1]}")
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


class DynamicMix(nn.Module):
    """Mixtures of each token with the previous one whose mu depend on the token (RWKV-6), for w, k, v, r and g.

    Args:
        width: number of channels.
        rank: rank of each map from tokens to mu.
        layer_idx: number of the layer, from 0; decides the initial mu together with `n_layers`.
        n_layers: number of layers.
    """

    MIXTURES = 5

    def __init__(self, width: int, rank: int, layer_idx: int, n_layers: int) -> None:
        super().__init__()
        self.depth = layer_idx / max(n_layers - 1, 1), layer_idx / n_layers
        self.parameter_roles = {"weight": Role.VECTOR, "down.weight": Role.GATE, "up": Role.GATE}
        self.weight = nn.Parameter(torch.empty(1 + self.MIXTURES, width))
        self.down = nn.Linear(width, self.MIXTURES * rank, bias=False)
        self.up = nn.Parameter(torch.empty(self.MIXTURES, rank, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise mu as the RWKV-6 authors' code, and the maps at random, `up` within 0.01."""
        self.down.reset_parameters()
        nn.init.uniform_(self.up, -0.01, 0.01)
        width = self.weight.shape[1]
        channel = torch.arange(width, device=self.weight.device, dtype=torch.float64) / width
        whole, half = (channel ** (power * (1 - self.depth[1])) for power in (1, 0.5))
        # of the input of the maps, then of w, k, v, r and g
        shares = (whole, whole, whole, whole + 0.3 * self.depth[0], half, half)
        for mu, share in zip(self.weight, shares, strict=True):
            mu.copy_(1 - share)

    def forward(self, x: Float[Tensor, "B T C"], previous: Float[Tensor, "B T C"]) -> Float[Tensor, "5 B T C"]:
        """Return the mixtures of tokens with their previous tokens."""
        mu = self.weight[:, None, None].to(x.dtype)
        change = previous - x
        low = self.down(x + mu[0] * change).tanh().unflatten(-1, (self.MIXTURES, -1))
        up = self.up if low.dtype == self.up.dtype else self.up.to(low.dtype)
        dynamic = torch.bmm(low.flatten(0, 1).transpose(0, 1), up).view(-1, *x.shape)
        return x + (mu[1:] + dynamic) * change
