"""The RetNet authors' own implementation, torchscale, in each of its modes."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .peer import Peer

CHUNK = 128
"""Chunk length in tokens of its chunkwise mode; its default of 512 is slower on a CPU."""


class TorchscaleParallel(Peer):
    """In its parallel mode."""

    name = "torchscale-parallel"
    layers_at = "layers"
    roles = frozenset({"train"})
    needs = "torchscale", "torchscale"
    needs_retention = True
    chunkwise: ClassVar[bool] = False

    def build(self) -> nn.Module:
        c, retention = self.size.config, self.size.retention
        assert retention is not None
        with torchscale() as theirs:
            config = theirs.Config(
                vocab_size=c.vocab_size,
                decoder_embed_dim=c.d_model,
                decoder_value_embed_dim=2 * c.d_model,
                decoder_retention_heads=retention.n_heads,
                decoder_ffn_embed_dim=self.size.hidden(8, 3),
                decoder_layers=c.n_layers,
                chunkwise_recurrent=self.chunkwise,
                recurrent_chunk_size=CHUNK,
            )
            return theirs.Decoder(config, embed_tokens=nn.Embedding(c.vocab_size, c.d_model))

    def logits(self, tokens: Tensor) -> Tensor:
        return self.module(tokens)[0]

    def read(self, tokens: Tensor) -> Any:
        """Token by token: its other modes give no state."""
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
        # it is given all tokens, and reads the last one alone
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
    """In its chunkwise mode."""

    name = "torchscale-chunkwise"
    chunkwise = True


class TorchscaleRecurrent(TorchscaleParallel):
    """In its recurrent mode, which decodes."""

    name = "torchscale-recurrent"
    roles = frozenset({"decode"})


TORCHSCALE = (TorchscaleParallel, TorchscaleChunkwise, TorchscaleRecurrent)


@contextmanager
def torchscale() -> Iterator[SimpleNamespace]:
    """Its classes. It imports fairscale and timm, of which nothing is used here: where they lack, stubs stand in."""
    names = ["fairscale", "fairscale.nn", "timm", "timm.models", "timm.models.layers"]
    stubs = {name: ModuleType(name) for name in names if find_spec(name.partition(".")[0]) is None}
    for name, used in (("fairscale.nn", ("checkpoint_wrapper", "wrap")), ("timm.models.layers", ("drop_path",))):
        for word in used if name in stubs else ():
            setattr(stubs[name], word, None)
    sys.modules.update(stubs)
    try:
        from torchscale.architecture.config import RetNetConfig  # type: ignore[import-not-found]
        from torchscale.architecture.retnet import RetNetDecoder, RetNetRelPos  # type: ignore[import-not-found]
        from torchscale.component.multiscale_retention import (  # type: ignore[import-not-found]
            MultiScaleRetention,
        )

        yield SimpleNamespace(
            Config=RetNetConfig, Decoder=RetNetDecoder, RelPos=RetNetRelPos, Retention=MultiScaleRetention
        )
    finally:  # nobody else may find modules that were built on stubs
        for name in [name for name in sys.modules if name in stubs or name.partition(".")[0] == "torchscale"]:
            del sys.modules[name]
