"""PaTH attention against flash-linear-attention's plain reference."""

import pytest
import torch
from fla_oracles import agree, loaded, needs_fla, with_gradients

from seqmix.mixers import Paradigm
from seqmix.ops.attention.path import path_attention
from seqmix.ops.delta import unit_norm

B, T, H, K = 2, 50, 2, 8


@needs_fla
@pytest.mark.parametrize("paradigm", list(Paradigm))
@pytest.mark.parametrize(("groups", "gated"), [(2, False), (1, False), (2, True)])
def test_outputs_and_gradients_match_fla_reference(paradigm, groups, gated):
    generator = torch.Generator().manual_seed(0)
    q, k, v, w = torch.randn(4, B, T, H, K, generator=generator)
    beta = 2 * torch.rand(B, T, H, generator=generator)
    k, v, w, beta = (y[:, :, :groups].contiguous() for y in (k, v, unit_norm(w), beta))
    gates = -torch.rand(B, T, H, generator=generator) if gated else torch.zeros(B, T, H)
    scale = K**-0.5
    naive = loaded("path_attn").naive_path_attn

    def theirs(q, k, v, w, beta, gates):
        return [naive(q, k, v, w, beta, gates / scale, scale, 16)]  # it multiplies the gates by the scale

    def ours(q, k, v, w, beta, gates):
        return path_attention(q, k, v, w, beta, log_forget=gates, paradigm=paradigm, chunk_size=24)

    arguments = (q, k, v, w, beta, gates)
    for found, expected in zip(with_gradients(ours, arguments), with_gradients(theirs, arguments), strict=True):
        agree(found, expected)
