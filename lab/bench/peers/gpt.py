"""A plain Transformer in the style of nanoGPT: LayerNorm, causal attention, GELU.

Attention either forms the whole matrix of scores, or calls torch's fused function. Positions are sines added to the
embedding: a learned table would grow with the length, while models of all lengths should have the same size.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .peer import ALL, Peer

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values of every layer, [B H S K], allocated once for S tokens."""


class GptBlock(nn.Module):
    """Layer of a Transformer: causal attention and a GELU feed-forward network, each after a norm."""

    def __init__(self, d_model: int, n_heads: int, hidden: int, *, fused: bool) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.fused = fused
        self.norm_1 = nn.LayerNorm(d_model, bias=False)
        self.norm_2 = nn.LayerNorm(d_model, bias=False)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, read: int = 0) -> Tensor:
        """Compute the layer's output; keys and values are written to the cache after the `read` tokens in it."""
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for y in self.qkv(self.norm_1(x)).chunk(3, -1))
        if cache is not None:
            end = read + x.shape[1]
            cache[0][:, :, read:end], cache[1][:, :, read:end] = k, v
            k, v = cache[0][:, :, :end], cache[1][:, :, :end]
        attend = F.scaled_dot_product_attention if self.fused else eager_attention
        # a single query sees all keys; longer segments only occur with an empty cache
        x = x + self.out(attend(q, k, v, is_causal=x.shape[1] > 1).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Gpt(nn.Module):
    """Transformer language model."""

    def __init__(self, vocab_size: int, d_model: int, n_layers: int, n_heads: int, hidden: int, *, fused: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(GptBlock(d_model, n_heads, hidden, fused=fused) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model, bias=False)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, cache: Cache | None = None, read: int = 0, *, last_only: bool = False) -> Tensor:
        """Compute the logits, only the last if `last_only`; the cache already holds the first `read` tokens."""
        x = self.embedding(tokens)
        x = x + sines(read, tokens.shape[1], x)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], read)
        return self.head(self.norm(x[:, -1:] if last_only else x))


def sines(start: int, length: int, like: Tensor) -> Tensor:
    """Return sines and cosines of `length` positions from `start`, [T D] (arXiv 1706.03762, §3.5)."""
    position = torch.arange(start, start + length, device=like.device, dtype=torch.float32)
    half = like.shape[-1] // 2
    rate = torch.exp(torch.arange(half, device=like.device) * (-math.log(10000.0) / half))
    angle = position[:, None] * rate
    return torch.cat((angle.sin(), angle.cos()), dim=-1).to(like.dtype)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
    """Compute softmax attention, [B H T K], by the textbook formula: all scores are kept for the backward pass."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1) @ v


class GptSdpa(Peer):
    """Transformer with torch's fused attention (SDPA)."""

    name = "gpt-sdpa"
    layers_at = "blocks"
    roles = ALL
    compiled_roles = frozenset({"train"})
    writes_state = False
    fused: ClassVar[bool] = True

    def build(self) -> nn.Module:
        c = self.size.config
        hidden = self.size.hidden(4, 2)
        return Gpt(c.vocab_size, c.d_model, c.n_layers, self.size.n_heads, hidden, fused=self.fused)

    def logits(self, tokens: Tensor) -> Tensor:
        return self.module(tokens)

    def _cache(self, batch: int, capacity: int) -> Cache:
        c = self.size.config
        heads = self.size.n_heads
        shape = (batch, heads, capacity, c.d_model // heads)
        return [(self.random(*shape), self.random(*shape)) for _ in range(c.n_layers)]

    def read(self, tokens: Tensor) -> Any:
        batch, length = tokens.shape
        cache = self._cache(batch, 2 * length)
        self.module(tokens, cache, last_only=True)
        return cache, length

    def state_after(self, context: int, batch: int, room: int) -> Any:
        return self._cache(batch, context + room), context

    def renew(self, state: Any, context: int) -> Any:
        return state[0], context

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        cache, read = state
        return self.module(tokens[:, None], cache, read)[:, 0], (cache, read + 1)


class GptEager(GptSdpa):
    """Transformer with attention by the textbook formula, as in nanoGPT's slow path."""

    name = "gpt-eager"
    fused = False
