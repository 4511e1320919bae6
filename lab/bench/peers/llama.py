"""The Llama model of Hugging Face transformers, with SDPA."""

import inspect
from typing import Any

from torch import Tensor, nn

from .peer import ALL, Peer


class Llama(Peer):
    """Llama with its default KV cache, which is copied for every token."""

    name = "llama"
    layers_at = "model.layers"
    roles = ALL
    compiled_roles = frozenset({"train"})
    writes_state = False
    needs = "transformers", "transformers"

    def build(self) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM  # type: ignore[import-not-found]

        c = self.size.config
        heads = self.size.n_heads
        self.config = LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=self.size.hidden(4, 3),
            num_hidden_layers=c.n_layers,
            num_attention_heads=heads,
            max_position_embeddings=2**20,
            attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]  an argument of every configuration
        )
        model = LlamaForCausalLM(self.config)
        # transformers 5.24 renamed the argument
        self.cache_argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        return model

    def logits(self, tokens: Tensor) -> Tensor:
        return self.module(tokens, use_cache=False).logits

    def cache(self, capacity: int) -> Any:  # noqa: ARG002
        """Return an empty KV cache; `capacity` is ignored here, since the cache grows."""
        from transformers import DynamicCache  # type: ignore[import-not-found]

        return DynamicCache(config=self.config)

    def read(self, tokens: Tensor) -> Any:
        cache = self.cache(2 * tokens.shape[1])
        self._last_logits(tokens, cache)
        return cache

    def state_after(self, context: int, batch: int, room: int) -> Any:
        cache = self.cache(context + room)
        heads = self.size.n_heads
        shape = (batch, heads, context, self.size.config.d_model // heads)
        for layer in cache.layers:
            layer.update(self.random(*shape), self.random(*shape))
        return cache

    def renew(self, state: Any, context: int) -> Any:
        for layer in state.layers:
            layer.keys = layer.keys[:, :, :context]
            layer.values = layer.values[:, :, :context]
        return state

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self._last_logits(tokens[:, None], state), state

    def _last_logits(self, tokens: Tensor, cache: Any) -> Tensor:
        return self.module(tokens, use_cache=True, logits_to_keep=1, **{self.cache_argument: cache}).logits[:, -1]

    def tensors(self, state: Any) -> list[Tensor]:
        return [leaf for layer in state.layers for leaf in (layer.keys, layer.values)]


class LlamaStatic(Llama):
    """Llama with a static KV cache, which is allocated once and can be compiled."""

    name = "llama-static-cache"
    roles = compiled_roles = frozenset({"decode"})

    def cache(self, capacity: int) -> Any:
        from transformers import StaticCache  # type: ignore[import-not-found]

        return StaticCache(config=self.config, max_cache_len=capacity)

    def renew(self, state: Any, context: int) -> Any:
        for layer in state.layers:
            layer.cumulative_length.fill_(context)
        return state
