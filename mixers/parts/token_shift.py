"""The token before each: of a segment that continues a state, of packed documents, and over several processes."""

import torch
from jaxtyping import Float
from torch import Tensor

from ...ops.call import Call
from ...ops.convolution import ConvolutionOutput, convolve_short


def token_shift(x: Float[Tensor, "B T C"], before: Float[Tensor, "N 1 C"], call: Call) -> ConvolutionOutput:
    """x_{t-1} of every token, and x of a row's or document's last token if states are wanted, [N 1 C].

    Args:
        x: the segment.
        before: what comes before the first token of a row or document.
        call: that of the mixer, whatever its state.
    """
    older = torch.tensor([1.0, 0.0], device=x.device, dtype=x.dtype).expand(x.shape[2], 2)
    return convolve_short(x, older, None, call._replace(state=before))
