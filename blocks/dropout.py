"""Dropout whose masks are those of a batch, however it is divided: among processes, or into micro-batches.

An element is dropped where a hash of a key, its token's index in the whole batch and its channel is below p. Hashes
multiply and fold, as SplitMix64 and xxHash end, which takes less time than a generator of random numbers.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """nn.Dropout of [B T D]; where `place` is set, its mask is a function of that alone."""

    place: Int[Tensor, "3"] | None = None
    """A key, the index of the first token, and how many a row has, of which those here may be a part."""

    def forward(self, input: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The input with elements set to 0, and the others scaled, in training."""
        if not self.training or self.place is None:
            return super().forward(input)
        with torch.no_grad():
            rows, tokens, channels = (torch.arange(size, device=input.device) for size in input.shape)
            x = self.place[0] ^ (self.place[1] + rows[:, None] * self.place[2] + tokens) * -0x61C8864680B583EB
            x = (x ^ x >> 32) * -0x40A7B892E31B1A47
            # 32 bits of a token are enough, and quicker; a shift keeps the sign, which the masks take
            x = (x ^ x >> 29).int()[..., None] + channels.int() * -0x61C8864F
            x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7A143589
            x = (x ^ (x >> 13 & 0x7FFFF)) * -0x3D4D51C3
            kept = (x ^ (x >> 16 & 0xFFFF)) >= int((self.p - 0.5) * 2**32)
        return torch.where(kept, input, 0) * (1 / (1 - self.p))
