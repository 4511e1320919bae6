"""Adapters for testing layers of other packages with `seqmix check`; results: docs/explanation/found-in-others.md.

A package is imported only when its layer is made.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqmix.testing import adapt


def make_performer(d_model):
    """Causal linear attention of performer-pytorch."""
    from performer_pytorch import SelfAttention

    return SelfAttention(dim=d_model, heads=2, dim_head=8, causal=True)


performer = adapt(make_performer, kind="performer")


def make_mega(d_model):
    """Single-headed attention of Mega-pytorch with the Laplacian function."""
    from mega_pytorch.mega_pytorch import SingleHeadedAttention

    layer = SingleHeadedAttention(dim=d_model, dim_qk=8, dim_value=d_model, causal=True, laplacian_attn_fn=True)
    # at initialisation a random bias can make a token's weight for itself exactly 0
    nn.init.zeros_(layer.rel_pos_bias.relative_attention_bias.weight)
    nn.init.normal_(layer.offsetscale.gamma)
    return layer


mega = adapt(make_mega, kind="mega")


class Rotated(nn.Module):
    """Attention with the rotary embedding of rotary-embedding-torch."""

    def __init__(self, d_model):
        from rotary_embedding_torch import RotaryEmbedding

        super().__init__()
        self.rotary = RotaryEmbedding(dim=8)
        self.project = nn.Linear(d_model, 3 * 8)
        self.out = nn.Linear(8, d_model)

    def forward(self, x):
        q, k, v = self.project(x).chunk(3, dim=-1)
        q, k = (self.rotary.rotate_queries_or_keys(each[:, None])[:, 0] for each in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Hidden(NamedTuple):
    """State of minGRU-pytorch: [B 1 D]."""

    h: Tensor


def make_min_gru(d_model):
    """The layer of minGRU-pytorch."""
    from minGRU_pytorch import minGRU

    return minGRU(d_model)


def call_min_gru(layer, x, state, cu_seqlens, return_state):
    y, h = layer(x, None if state is None else state.h, return_next_prev_hidden=True)
    return y, Hidden(h)


def start_min_gru(layer, rows):
    weight = layer.to_hidden_and_gate.weight
    return Hidden(weight.new_zeros(rows, 1, weight.shape[1]))


min_gru = adapt(make_min_gru, call=call_min_gru, state=start_min_gru, kind="min_gru")


class Window(NamedTuple):
    """The last inputs of the convolution of xlstm: [B 4 D]."""

    last: Tensor


def make_causal_conv(d_model):
    """The causal convolution of xlstm."""
    from xlstm.components.conv import CausalConv1d, CausalConv1dConfig

    return CausalConv1d(CausalConv1dConfig(feature_dim=d_model, kernel_size=4))


def call_causal_conv(layer, x, state, cu_seqlens, return_state):
    if state is None and not return_state:
        return layer(x), None
    (last,) = state or start_causal_conv(layer, len(x))
    outputs = []
    for token in x.split(1, dim=1):
        y, (last,) = layer.step(token, (last,))
        outputs.append(y)
    return torch.cat(outputs, dim=1), Window(last)


def start_causal_conv(layer, rows):
    return Window(layer.conv.weight.new_zeros(rows, 4, layer.conv.in_channels))


causal_conv = adapt(make_causal_conv, call=call_causal_conv, state=start_causal_conv, kind="causal_conv")


class MambaCache(NamedTuple):
    """State of a block of mambapy: [B C N], and the last inputs of its convolution, [B C W-1]."""

    h: Tensor
    inputs: Tensor


def make_mamba(d_model):
    """A block of mambapy."""
    from mambapy.mamba import MambaBlock, MambaConfig

    return MambaBlock(MambaConfig(d_model=d_model, n_layers=1))


def call_mamba(layer, x, state, cu_seqlens, return_state):
    if state is None and not return_state:
        return layer(x), None
    state = state or start_mamba(layer, len(x))
    outputs = []
    for token in x.unbind(1):
        y, state = layer.step(token, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), MambaCache(*state)


def start_mamba(layer, rows):
    config, new = layer.config, layer.D.new_zeros
    return MambaCache(new(rows, config.d_inner, config.d_state), new(rows, config.d_inner, config.d_conv - 1))


mamba = adapt(make_mamba, call=call_mamba, state=start_mamba, kind="mamba")


class KeysAndValues(NamedTuple):
    """Cache of local-attention: [B H T K] each."""

    keys: Tensor
    values: Tensor


def make_local_attention(d_model):
    """The attention of local-attention with its cache."""
    from local_attention.transformer import LocalMHA

    return LocalMHA(dim=d_model, window_size=16, dim_head=8, heads=2, causal=True)


def call_local_attention(layer, x, state, cu_seqlens, return_state):
    if state is None or state.keys.shape[2] == 0:
        y, cache = layer(x, return_cache=True)
        return y, KeysAndValues(*cache)
    outputs = []
    for token in x.split(1, dim=1):
        y, cache = layer(token, cache=torch.stack(state), return_cache=True)
        state = KeysAndValues(*cache)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def start_local_attention(layer, rows):
    empty = layer.to_qkv.weight.new_zeros(rows, 2, 0, 8)
    return KeysAndValues(empty, empty)


local_attention = adapt(
    make_local_attention,
    call=call_local_attention,
    state=start_local_attention,
    traits={"state": "growing"},
    kind="local_attention",
)
