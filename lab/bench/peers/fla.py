"""flash-linear-attention's RetNet: Triton kernels, for a GPU."""

from typing import Any

import torch
from torch import Tensor, nn

from .peer import ALL, Peer


class Fla(Peer):
    """flash-linear-attention's RetNet with its own kernels."""

    name = "fla"
    layers_at = "model.layers"
    roles = ALL
    needs = "fla.models", "flash-linear-attention"
    needs_gpu = needs_retention = True

    def build(self) -> nn.Module:
        from fla.models import RetNetConfig, RetNetForCausalLM  # type: ignore[import-not-found]

        c = self.size.config
        retention = self.size.retention
        assert retention is not None
        return RetNetForCausalLM(
            RetNetConfig(
                vocab_size=c.vocab_size,
                hidden_size=c.d_model,
                num_hidden_layers=c.n_layers,
                num_heads=retention.n_heads,
                expand_k=1,
                expand_v=2,
                intermediate_size=self.size.hidden(8, 3),
                tie_word_embeddings=False,
            )
        )

    def logits(self, tokens: Tensor) -> Tensor:
        return self.module(tokens, use_cache=False).logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        # fla's own loss, fused with the last product, shifts the labels by one: undo the shift
        labels = torch.cat((tokens[:, :1], targets[:, :-1]), dim=1)
        return self.module(tokens, labels=labels, use_cache=False).loss

    def read(self, tokens: Tensor) -> Any:
        return self.module(tokens, use_cache=True, logits_to_keep=1).past_key_values

    def state_after(self, context: int, batch: int, room: int) -> Any:  # noqa: ARG002
        # state size and cost per step do not depend on the context: any prompt will do
        return self.read(torch.randint(self.size.config.vocab_size, (batch, context), device=self.device))

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.module(tokens[:, None], past_key_values=state, use_cache=True).logits[:, 0], state

    def tensors(self, state: Any) -> list[Tensor]:
        return [layer["recurrent_state"] for layer in state]
