"""Tests of the contract by seqmix's own checks, and of the equations by a plain loop."""

import pytest
import torch
from seqmix_mingru import MinGRUConfig, MinGRUState
from torch.testing import assert_close

from seqmix.testing import parametrize_checks


@parametrize_checks([MinGRUConfig()])
def test_conformance(check):
    """Test every property of the contract."""
    check()


@pytest.mark.parametrize("paradigm", sorted(MinGRUConfig().traits.paradigms))
def test_it_computes_its_definition(paradigm):
    """Compare output, state and gradients with the equations, computed token by token."""
    torch.manual_seed(0)
    mixer = MinGRUConfig(expansion=2).build(6, layer_idx=0, n_layers=1).double()
    x = torch.randn(3, 21, 6, dtype=torch.float64, requires_grad=True)
    before = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    w_z, w_h = mixer.in_proj.weight.chunk(2)

    h, outputs = before, []
    for t in range(x.shape[1]):
        z = torch.sigmoid(x[:, t] @ w_z.T)
        h = (1 - z) * h + z * (x[:, t] @ w_h.T)
        outputs.append(h @ mixer.out_proj.weight.T)

    leaves = [x, before, *mixer.parameters()]
    expected = [torch.stack(outputs, dim=1), h]
    y, state = mixer(x, MinGRUState(before), paradigm=paradigm, return_state=True)
    actual = [y, state.hidden]
    upstream = [torch.randn_like(tensor) for tensor in expected]
    assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    gradients = (torch.autograd.grad(results, leaves, upstream) for results in (actual, expected))
    assert_close(*gradients, rtol=1e-9, atol=1e-9)
