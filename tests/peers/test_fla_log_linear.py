"""Log-linear attention against flash-linear-attention's plain reference."""

import pytest
import torch
from fla_oracles import agree, loaded, needs_fla, with_gradients

from seqmix.mixers import Paradigm
from seqmix.ops.fenwick import log_linear
from seqmix.ops.runtime.call import Call

B, T, G, H, K, V, L = 2, 40, 2, 4, 8, 6, 8


@needs_fla
@pytest.mark.parametrize("paradigm", list(Paradigm))
def test_output_and_gradients_match_fla_reference(paradigm):
    torch.manual_seed(0)
    q, k = torch.randn(2, B, T, G, K)
    arguments = [q, k, torch.randn(B, T, H, V), -torch.rand(B, T, H), torch.rand(B, T, H, L)]
    call = Call.of(paradigm, T, chunk_size=24)
    found = with_gradients(lambda *x: [log_linear(*x, None, call).output], arguments)
    expected = with_gradients(lambda *x: [loaded("log_linear_attn").naive_log_linear_attn(*x)], arguments)
    agree(found, expected)
