"""A RetNet written by hand, with the weights of a model built from a configuration.

It uses only the framework's computing functions: no configuration, registry, block or contract. The difference in
speed between both models is the overhead of the framework. A test checks that both run the same sequence of operations.
"""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ....blocks.ffn.mlp import MlpConfig
from ....blocks.norm.layernorm import LayerNormConfig
from ....mixers import Paradigm
from ....mixers.parts import rotated
from ....mixers.retention import RetentionConfig, normalizers, scheduled
from ....models import IGNORED, LanguageModel, ModelConfig, linear_cross_entropy
from ....models.cpu_linear import use_fast_linear
from ....ops.decay import decay
from ....ops.runtime.call import Call
from ....ops.runtime.memo import Memo, once
from ....ops.runtime.packing import token_positions

LayerState = tuple[Tensor, Tensor, Tensor]
"""State of a layer: memory matrix, state of the short convolution (always empty), and position."""
State = list[LayerState]
"""States of all layers."""


def unsupported_reason(config: ModelConfig) -> str | None:
    """Return the reason why the hand-written RetNet cannot have a configuration; None if it can."""
    plain = not config.tie_embeddings and not config.dropout and isinstance(config.norm, LayerNormConfig)
    for block in (config.blocks[name] for name in set(config.layers)):
        mixer = block.mixer
        ffn = block.ffn
        free = {"n_heads", "decay", "gamma", "chunk_size", "norm_eps"}
        plain = (
            plain
            and isinstance(mixer, RetentionConfig)
            and mixer == RetentionConfig(**{name: getattr(mixer, name) for name in free})
            and mixer.decay != "none"
            and isinstance(ffn, MlpConfig)
            and ffn.activation == "gelu"
            and isinstance(block.norm, LayerNormConfig)
            and not block.dropout
        )
    supported = "retention, mlp with gelu, layernorm, untied embeddings, no dropout"
    return None if plain else f"expects the paper's RetNet: {supported}"


class HandWrittenLayer(nn.Module):
    """Retention and a feed-forward network of two products, each after a norm."""

    def __init__(self, d_model: int, config: RetentionConfig, hidden: int, eps: float) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.chunk_size = config.chunk_size
        self.norm_eps = config.norm_eps
        self.key_dim = d_model // config.n_heads
        self.value_dim = 2 * d_model // config.n_heads
        self.mixer_norm = nn.LayerNorm(d_model, eps=eps, bias=False)
        self.in_proj = nn.Linear(d_model, 6 * d_model, bias=False)
        self.out_proj = nn.Linear(2 * d_model, d_model, bias=False)
        self.ffn_norm = nn.LayerNorm(d_model, eps=eps, bias=False)
        self.up_proj = nn.Linear(d_model, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d_model, bias=False)
        self.decay = config.decay
        self.gamma = config.gamma

    def forward(
        self, x: Tensor, state: LayerState | None, *, decode: bool, memo: Memo | None = None
    ) -> tuple[Tensor, LayerState | None]:
        """Compute the layer's output, and the state after the segment; None without an incoming state."""
        mixed, state = self._retain(self.mixer_norm(x), state, decode=decode, memo=memo)
        x = x + mixed
        return x + self.down_proj(F.gelu(self.up_proj(self.ffn_norm(x)))), state

    def init_state(self, batch: int) -> LayerState:
        """Return the state before the first token."""
        weight = self.in_proj.weight
        shape = (batch, self.n_heads, self.key_dim, self.value_dim)
        recent = torch.zeros(batch, 0, 0, device=weight.device, dtype=weight.dtype)
        position = torch.zeros(batch, device=weight.device, dtype=torch.int64)
        memory = torch.zeros(shape, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        return memory, recent, position

    def _retain(
        self, x: Tensor, state: LayerState | None, *, decode: bool, memo: Memo | None
    ) -> tuple[Tensor, LayerState | None]:
        _, length, d_model = x.shape
        memory, recent, offset = (None, None, None) if state is None else state
        qk, v, gate = self.in_proj(x).split([2 * d_model, 2 * d_model, 2 * d_model], dim=-1)
        qk = rearrange(qk, "b t (h k) -> b t h k", k=self.key_dim)
        v = rearrange(v, "b t (h v) -> b t h v", v=self.value_dim)
        positions = once(memo, token_positions, length, offset, None, x.device, 0)
        q, k = rotated(qk, positions, "retnet", 10000.0, memo=memo).split([self.n_heads, self.n_heads], dim=2)
        gate = rearrange(gate, "b t (h v) -> b t h v", v=self.value_dim)
        wide = torch.promote_types(self.in_proj.weight.dtype, torch.float32)
        exact, log_decay = once(memo, scheduled, self.n_heads, self.decay, self.gamma, x.device, wide)
        q = q * once(memo, normalizers, positions, exact, self.key_dim**-0.5, q.dtype)
        call = Call(
            Paradigm.RECURRENT if decode else Paradigm.CHUNKWISE,
            memory,
            return_state=memory is not None,
            chunk_size=self.chunk_size,
            donated=decode and not torch.is_grad_enabled(),
            memo=memo,
        )
        output, memory = decay(q, k, v, log_decay, call, scale=1.0)
        output = output.to(torch.float32 if output.dtype == torch.float16 else output.dtype)
        output = F.layer_norm(output, output.shape[-1:], eps=self.norm_eps) * F.silu(gate.to(output.dtype))
        y = self.out_proj(rearrange(output, "b t h v -> b t (h v)"))
        if memory is None or recent is None or offset is None:
            return y, None
        return y, (memory, recent, offset + length)


class HandWritten(nn.Module):
    """RetNet language model with the weights of a `LanguageModel`."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        config = model.config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList()
        for name in config.layers:
            block = config.blocks[name]
            assert isinstance(block.mixer, RetentionConfig)
            assert block.ffn is not None
            hidden = block.ffn.hidden_width(config.d_model)
            self.layers.append(HandWrittenLayer(config.d_model, block.mixer, hidden, block.norm.eps))
        self.norm = nn.LayerNorm(config.d_model, eps=config.norm.eps, bias=False)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.activation_checkpointing = False
        self.to(device=model.device, dtype=model.embedding.weight.dtype)
        with torch.no_grad():
            for target, source in zip(self.parameters(), model.parameters(), strict=True):
                target.copy_(source)
        use_fast_linear(self)

    def init_state(self, batch: int) -> State:
        """Return the states of all layers before the first token."""
        return [layer.init_state(batch) for layer in cast("list[HandWrittenLayer]", list(self.layers))]

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        decode: bool = False,
        select: Tensor | None = None,
        memo: Memo | None = None,
    ) -> tuple[Tensor, State | None]:
        """Compute the logits, and the state after the segment; None without an incoming state.

        `select` has the tokens whose logits are computed, as indexes into the flattened tokens [B*T]; None for all.
        """
        eager = not torch.compiler.is_compiling() and not torch.is_grad_enabled()
        memo = (Memo() if memo is None else memo).next_pass() if eager else None
        x, after = self._hidden(tokens, state, decode=decode, memo=memo)
        if select is not None:
            x = x.flatten(0, 1)[select]
        return self.head(self.norm(x)), after or None

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the targets that are not ignored, in nats."""
        x, _ = self._hidden(tokens, None, decode=False)
        total = linear_cross_entropy(self.norm(x).flatten(0, 1), self.head.weight, targets.flatten())
        return total / (targets != IGNORED).sum().clamp(min=1)

    def _hidden(
        self, tokens: Tensor, state: State | None, *, decode: bool, memo: Memo | None = None
    ) -> tuple[Tensor, State]:
        x = self.embedding(tokens)
        after: State = []
        for i, layer in enumerate(self.layers):
            layer_state = None if state is None else state[i]
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, new_state = checkpoint(layer, x, layer_state, decode=decode, use_reentrant=False)  # type: ignore[misc]
            else:
                x, new_state = layer(x, layer_state, decode=decode, memo=memo)
            if new_state is not None:
                after.append(new_state)
        return x, after
