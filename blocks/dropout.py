"""Dropout whose mask does not depend on how a batch is divided among processes and micro-batches.

An element is set to 0 if a hash of a key, of its token's index in the whole batch and of its channel is below p. The
hash multiplies and xor-shifts like the final steps of SplitMix64 and xxHash, faster than a random number generator.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """Dropout of x [B T D]. If `place` is set, it alone determines the mask; otherwise this is nn.Dropout."""

    place: Int[Tensor, "3"] | None = None
    """Three integers: the key of the hash, the index of the input's first token in the whole batch, and the number of
    tokens in a whole row (the input may have fewer). None to draw masks from torch's random generator."""

    def forward(self, input: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Return the input, in training with random elements set to 0 and the others scaled by 1 / (1 - p)."""
        if not self.training or self.place is None:
            return super().forward(input)
        with torch.no_grad():
            rows, tokens, channels = (torch.arange(size, device=input.device) for size in input.shape)
            x = self.place[0] ^ (self.place[1] + rows[:, None] * self.place[2] + tokens) * -0x61C8864680B583EB
            x = (x ^ x >> 32) * -0x40A7B892E31B1A47
            # 32 bits per token suffice and are faster; shifts extend the sign, so the sign bits are masked off
            x = (x ^ x >> 29).int()[..., None] + channels.int() * -0x61C8864F
            x = (x ^ (x >> 15 & 0x1FFFF)) * -0x7A143589
            x = (x ^ (x >> 13 & 0x7FFFF)) * -0x3D4D51C3
            kept = (x ^ (x >> 16 & 0xFFFF)) >= int((self.p - 0.5) * 2**32)
        return torch.where(kept, input, 0) * (1 / (1 - self.p))
