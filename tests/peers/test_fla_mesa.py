"""MesaNet against flash-linear-attention's plain references."""

import pytest
import torch
import torch.nn.functional as F
from fla_oracles import agree, loaded, needs_fla

from seqmix.mixers import Paradigm
from seqmix.ops.decay import decay
from seqmix.ops.ridge import ridge_solve
from seqmix.ops.runtime.call import Call

B, T, H, K = 2, 64, 3, 8
pytestmark = needs_fla


def inputs():
    """q, k, v, log-decay, ridge and beta, and initial G and S."""
    torch.manual_seed(0)
    q, k = F.normalize(torch.randn(2, B, T, H, K), dim=-1)
    earlier = torch.randn(B, H, 6, K)
    state = earlier.mT @ earlier, torch.randn(B, H, K, K)
    gates = -torch.rand(B, T, H), 0.25 + torch.rand(H, K), torch.rand(B, T, H)
    return q, k, torch.randn(B, T, H, K), *gates, *state


def ours(q, k, v, g, lamb, beta, gram, values, paradigm, iterations):
    x = ridge_solve(q, k, beta, g, lamb, iterations, Call.of(paradigm, T, gram, chunk_size=24))
    both = torch.cat((k, v), -1)
    options = {"initial_state": torch.cat((gram, values), -1), "output_final_state": True, "paradigm": paradigm}
    o, state = decay(x, beta[..., None] * k, both, g, scale=1.0, **options)
    return o[..., K:], *state.split([K, K], -1)


@pytest.mark.parametrize("paradigm", list(Paradigm))
def test_solution_matches_fla_exact_reference(paradigm):
    arguments = inputs()
    agree(ours(*arguments, paradigm, K + 4), loaded("mesa_net").naive_mesa_net_exact(*arguments))


@pytest.mark.parametrize("paradigm", list(Paradigm))
@pytest.mark.parametrize("iterations", [2, 30])
def test_conjugate_gradients_match_fla_reference(paradigm, iterations):
    q, k, v, g, lamb, beta, *state = inputs()
    expected = loaded("mesa_net").naive_mesa_net_CG(q, k, v, g, lamb, beta, 16, iterations, *state)
    # theirs adds 1e-5 to the denominators of its steps
    for found, wanted in zip(ours(q, k, v, g, lamb, beta, *state, paradigm, iterations), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
