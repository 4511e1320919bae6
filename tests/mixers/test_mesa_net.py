"""MesaNet's regression at every token: against a ridge regression, and its solution by conjugate gradients."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from mixer_formulas import exactly, tokens

from seqmix.mixers.mesa_net import MesaNetConfig
from seqmix.ops import ridge as ridge_ops
from seqmix.ops.decay import decay
from seqmix.ops.ridge import Chunks, ridge_solve
from seqmix.ops.runtime.call import Call
from seqmix.ops.runtime.paradigm import Paradigm

B, T, H, K, V = 2, 23, 2, 5, 3
ENOUGH = K + 4
every_paradigm = pytest.mark.parametrize("paradigm", list(Paradigm))


def inputs(dtype=torch.float64):
    """q, k, v, beta, log-decay and ridge."""
    torch.manual_seed(0)
    q, k = F.normalize(torch.randn(2, B, T, H, K, dtype=torch.float64), dim=-1)
    v, (beta, decays) = torch.randn(B, T, H, V), torch.rand(2, B, T, H, dtype=torch.float64)
    return [x.to(dtype) for x in (q, k, v, beta, decays.log(), 0.25 + torch.rand(H, K))]


def mesa(q, k, v, beta, log_decay, ridge, iterations=ENOUGH, paradigm=Paradigm.CHUNKWISE):
    """o_t = ((G_t + diag(ridge))^-1 q_t) S_t."""
    call = Call.of(paradigm, q.shape[1], chunk_size=7)
    x = ridge_solve(q, k, beta, log_decay, ridge, iterations, call)
    return decay(x, beta[..., None] * k, v, log_decay, call, scale=1.0).output


@every_paradigm
def test_mesa_output_matches_weighted_ridge_regression(paradigm):
    q, k, v, beta, log_decay, ridge = inputs()
    o = mesa(q, k, v, beta, log_decay, ridge, paradigm=paradigm)
    for b, t, h in ((0, 0, 0), (0, 11, 1), (1, T - 1, 0)):
        later = [log_decay[b, j + 1 : t + 1, h].sum() for j in range(t + 1)]
        weights = beta[b, : t + 1, h] * torch.stack(later).exp()
        # the sum of lambda W^2 as K more observations of the value 0
        keys = torch.cat((weights.sqrt()[:, None] * k[b, : t + 1, h], ridge[h].sqrt().diag()))
        values = torch.cat((weights.sqrt()[:, None] * v[b, : t + 1, h], v.new_zeros(K, V)))
        exactly(o[b, t, h], q[b, t, h] @ torch.linalg.lstsq(keys, values).solution)


def test_large_ridge_matches_linear_attention():
    q, k, v, beta, log_decay, ridge = inputs()
    attention = decay(q, beta[..., None] * k, v, log_decay, scale=1.0).output
    exactly(1e7 * mesa(q, k, v, beta, log_decay, torch.full_like(ridge, 1e7)), attention, 1e-5)


def test_residuals_fall_to_rounding_error():
    q, k, _, beta, log_decay, ridge = inputs()
    call = Call.of(Paradigm.CHUNKWISE, T, chunk_size=7)
    largest = []
    for iterations in range(1, ENOUGH + 1):
        x = ridge_solve(q, k, beta, log_decay, ridge, iterations, call)
        product = decay(x, beta[..., None] * k, k, log_decay, scale=1.0).output + ridge * x
        largest.append((product - q).norm(dim=-1).max().item())
    assert all(after < before for before, after in pairwise(largest[:K]))
    assert largest[-1] < 1e-14


@every_paradigm
def test_token_order_does_not_matter_without_decay(paradigm):
    q, k, v, beta, log_decay, ridge = inputs()
    order = torch.cat((torch.randperm(T - 1), torch.tensor([T - 1])))
    whole = mesa(q, k, v, beta, 0 * log_decay, ridge, paradigm=paradigm)
    again = mesa(*(x[:, order] for x in (q, k, v, beta)), 0 * log_decay, ridge, paradigm=paradigm)
    exactly(again[:, -1], whole[:, -1])


@every_paradigm
@pytest.mark.parametrize("iterations", [1, ENOUGH, 10 * ENOUGH])
def test_equal_keys_and_zero_queries_give_finite_results(paradigm, iterations):
    q, k, v, beta, log_decay, ridge = inputs(torch.float32)
    k, q = k[:, :1].expand_as(k), q * (torch.arange(T) % 3 > 0)[:, None, None]
    leaves = [x.requires_grad_() for x in (q, k.clone(), v, beta, 0 * log_decay, ridge)]
    o = mesa(*leaves, iterations=iterations, paradigm=paradigm)
    assert o.isfinite().all()
    assert not o[:, ::3].any()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(o.square().sum(), leaves))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_solver_handles_right_hand_sides_of_any_scale(size):
    q, k, _, beta, log_decay, ridge = inputs(torch.float32)
    call = Call.of(Paradigm.CHUNKWISE, T)
    x, scaled = (ridge_solve(y, k, beta, log_decay, ridge, ENOUGH, call) for y in (q, size * q))
    torch.testing.assert_close(scaled / size, x, rtol=1e-4, atol=1e-5)


def test_unconverged_iterations_agree_across_paradigms_and_are_declared():
    mixer = MesaNetConfig(n_heads=2, iterations=2, chunk_size=7).build(12, layer_idx=0, n_layers=1).double()
    converged = MesaNetConfig(n_heads=2, chunk_size=7).build(12, layer_idx=0, n_layers=1).double()
    converged.load_state_dict(mixer.state_dict())
    assert (mixer.traits.surrogate_gradients, converged.traits.surrogate_gradients) == (True, False)
    x = tokens(T)
    outputs = [mixer(x, paradigm=paradigm)[0] for paradigm in Paradigm]
    for output in outputs[1:]:
        exactly(output, outputs[0])
    assert (outputs[0] - converged(x)[0]).abs().max() > 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99, 1.0])
def test_solver_stops_early_at_full_precision_independently_per_row(dtype, tolerance, kept, monkeypatch):
    torch.manual_seed(0)
    q, k = F.normalize(torch.randn(2, B, 70, H, 64, dtype=dtype), dim=-1)
    beta, log_decay = torch.rand(B, 70, H, dtype=dtype), torch.full((B, 70, H), kept, dtype=dtype).log()
    ridge, call, count = torch.ones(H, 64, dtype=dtype), Call.of(Paradigm.CHUNKWISE, 70, chunk_size=16), []
    q[0, ::3] = 0
    log_decay[1] *= 0.1  # slow, so that its systems take the most iterations
    times = Chunks.times
    monkeypatch.setattr(Chunks, "times", lambda chunks, y: count.append(1) or times(chunks, y))
    x = ridge_solve(q, k, beta, log_decay, ridge, 68, call)
    assert len(count) < 68
    product = decay(x, beta[..., None] * k, k, log_decay, scale=1.0).output + ridge * x
    assert ((product - q).norm(dim=-1) <= 2 * tolerance * q.norm(dim=-1)).all()
    alone = [ridge_solve(*(y[n : n + 1] for y in (q, k, beta, log_decay)), ridge, 68, call) for n in range(B)]
    torch.testing.assert_close(torch.cat(alone), x, rtol=0, atol=tolerance)
    monkeypatch.setattr(ridge_ops, "FEW", 68)
    count.clear()
    whole = ridge_solve(q, k, beta, log_decay, ridge, 68, call)
    assert len(count) == 68
    assert ((x - whole).norm(dim=-1) <= tolerance * whole.norm(dim=-1)).all()


def test_lambda_starts_at_one():
    mixer = MesaNetConfig(n_heads=2, min_ridge=0.5).build(12, layer_idx=0, n_layers=1)
    torch.testing.assert_close(0.5 + F.softplus(mixer.ridge), torch.ones(2, 6))
