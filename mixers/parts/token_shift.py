"""The token before each: of a segment that continues a state, of packed documents, and over several processes."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...ops.convolution import ConvolutionOutput, shift_tokens
from ...ops.runtime.call import Call


def token_shift(x: Float[Tensor, "B T C"], before: Float[Tensor, "N 1 C"] | None, call: Call) -> ConvolutionOutput:
    """x_{t-1} of every token, and x of a row's or document's last token if states are wanted, [N 1 C].

    Args:
        x: the segment.
        before: what comes before the first token of a row or document; zeros where it is None.
        call: that of the mixer, whatever its state.
    """
    return shift_tokens(x, call._replace(state=before))


class TokenShift(nn.Module):
    """Each token mixed with the one before it, x_t + mu * (x_{t-1} - x_t), by channel and in several ways.

    Args:
        width: channels.
        powers: of each way, p; its mu starts at 1 - (channel / width)^p, from the token before to the token itself.
    """

    def __init__(self, width: int, powers: Sequence[float]) -> None:
        super().__init__()
        self.powers = tuple(powers)
        self.weight = nn.Parameter(torch.empty(len(powers), width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Mixtures that differ by channel."""
        width = self.weight.shape[1]
        channel = torch.arange(width, device=self.weight.device, dtype=torch.float64) / width
        for mu, power in zip(self.weight, self.powers, strict=True):
            mu.copy_(1 - channel**power)

    def forward(
        self, x: Float[Tensor, "B T C"], call: Call
    ) -> tuple[Float[Tensor, "ways B T C"], Float[Tensor, "N 1 C"] | None]:
        """All mixtures of one segment; the state is its last token, in the parameters' dtype."""
        before = x.new_zeros(call.rows(x.shape[0]), 1, x.shape[2]) if call.state is None else call.state
        shifted, last = token_shift(x, before, call)
        mixed = torch.lerp(x, shifted, self.weight[:, None, None].to(x.dtype))
        return mixed, None if last is None else last.to(self.weight.dtype)

    def init_state(self, batch_size: int) -> Float[Tensor, "B 1 C"]:
        """The initial state: zeros."""
        return self.weight.new_zeros(batch_size, 1, self.weight.shape[1])
