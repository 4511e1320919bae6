"""TTT-Linear against fla's plain reference, in float32."""

import pytest
import torch

from seqmix.ops.runtime.call import Call
from seqmix.ops.ttt import FastLayer, Norm, ttt

naive = pytest.importorskip("fla.ops.ttt.naive")

BATCH = 4


@pytest.mark.parametrize("length", [16, 20])
def test_output_and_state_match_fla_reference(length):
    torch.manual_seed(0)
    b, h, d = 2, 3, 8
    q, k, v = torch.randn(3, b, length, h, d)
    weight, bias = 1 + 0.3 * torch.randn(h, d), 0.3 * torch.randn(h, d)
    w0, b0 = 0.3 * torch.randn(b, h, d, d), 0.3 * torch.randn(b, h, 1, d)
    factor = 0.2 / torch.arange(1, BATCH + 1)
    eta = factor.repeat(length // BATCH)[None, :, None, None].expand(b, -1, h, 1)
    options = {"scale": 1.0, "mini_batch_size": BATCH, "output_final_state": True}
    their_y, their_w, their_b = naive.chunk_ttt_linear_ref(
        q.clone(), k, v, weight, bias, eta.clone(), initial_state=w0, initial_state_bias=b0, **options
    )
    layer = FastLayer(w0, b0, torch.zeros_like(w0), torch.zeros_like(b0))
    start = torch.zeros(b, dtype=torch.int64)
    for paradigm in ("chunkwise", "recurrent"):
        call = Call.of(paradigm, length, output_final_state=True)
        y, layers = ttt(q, k, v, torch.ones(b, length, h), factor, [layer], start, call, Norm(weight, bias, 1e-6))
        # theirs adds the norm to the memory's output z, where the paper adds it to the query
        normed = y - q
        z = their_y - normed
        again = torch.nn.functional.layer_norm(z, (d,), eps=1e-6) * weight + bias
        torch.testing.assert_close(normed, again, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(layers[0].weight, their_w, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layers[0].bias, their_b, rtol=1e-4, atol=1e-4)
