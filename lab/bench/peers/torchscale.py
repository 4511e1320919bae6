"""torchscale, the implementation of the RetNet authors, in each of its modes."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .peer import Peer

CHUNK = 128
"""Chunk length, in tokens, of torchscale's chunkwise mode; the default there, 512, is slower on a CPU."""


class TorchscaleParallel(Peer):
    """torchscale's RetNet in its parallel mode."""

    name = "torchscale-parallel"
    layers_at = "layers"
    roles = frozenset({"train"})
    needs = "torchscale", "torchscale"
    needs_retention = True
    chunkwise: ClassVar[bool] = False

    def build(self) -> nn.Module:
        c = self.size.config
        retention = self.size.retention
        assert retention is not None
        config = torchscale().Config(
            vocab_size=c.vocab_size,
            decoder_embed_dim=c.d_model,
            decoder_value_embed_dim=2 * c.d_model,
            decoder_retention_heads=retention.n_heads,
            decoder_ffn_embed_dim=self.size.hidden(8, 3),
            decoder_layers=c.n_layers,
            chunkwise_recurrent=self.chunkwise,
            recurrent_chunk_size=CHUNK,
        )
        return torchscale().Decoder(config, embed_tokens=nn.Embedding(c.vocab_size, c.d_model))

    def logits(self, tokens: Tensor) -> Tensor:
        return self.module(tokens)[0]

    def read(self, tokens: Tensor) -> Any:
        """Process a prompt token by token: only the recurrent mode returns a state."""
        state = self.state_after(0, len(tokens), 2 * tokens.shape[1])
        for memory in state[0].values():
            memory.clear()
        for token in tokens.unbind(1):
            _, state = self.step(token, state)
        return state

    def state_after(self, context: int, batch: int, room: int) -> Any:
        layer = self.module.layers[0].retention
        shape = (batch, layer.num_heads, layer.head_dim, layer.key_dim)
        scale = torch.ones(layer.num_heads, device=self.device, dtype=self.dtype)
        memory = {i: {"prev_key_value": self.random(*shape), "scale": scale} for i in range(len(self.layers))}
        # the decoder is passed all tokens so far but processes only the last
        return memory, torch.zeros(batch, context + room, device=self.device, dtype=torch.int64), context

    def renew(self, state: Any, context: int) -> Any:
        return state[0], state[1], context

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        memory, read, position = state
        read[:, position] = tokens
        return self.module(read[:, : position + 1], memory)[0][:, 0], (memory, read, position + 1)

    def tensors(self, state: Any) -> list[Tensor]:
        return [layer["prev_key_value"] for layer in state[0].values()]


class TorchscaleChunkwise(TorchscaleParallel):
    """torchscale's RetNet in its chunkwise mode."""

    name = "torchscale-chunkwise"
    chunkwise = True


class TorchscaleRecurrent(TorchscaleParallel):
    """torchscale's RetNet in its recurrent mode, which decodes."""

    name = "torchscale-recurrent"
    roles = frozenset({"decode"})


TORCHSCALE = (TorchscaleParallel, TorchscaleChunkwise, TorchscaleRecurrent)


def torchscale() -> Any:
    """Return torchscale's classes, loaded by the conformance kit's adapter."""
    from ....testing.adapters.torchscale import torchscale

    return torchscale()
