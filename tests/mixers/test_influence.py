"""Weights with which outputs read tokens, from gradients: they rebuild an op's output and reflect its decays' reach."""

import pytest
import torch

from seqmix.mixers import MIXERS
from seqmix.mixers.base.influence import head_weights, reach_of, weights_of
from seqmix.mixers.base.layer_call import PLAIN_CALL
from seqmix.mixers.parts import TimeStepDecay
from seqmix.mixers.retention import FixedDecay, RetentionConfig
from seqmix.ops.runtime.recording import recorded

LENGTH = 12


def x_of(d_model=24, length=LENGTH):
    return torch.randn(2, length, d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def built(kind, d_model=24, **fields):
    torch.manual_seed(0)
    config = MIXERS.built_in()[kind]
    fields = config.example_fields() | fields
    return config(**fields).build(d_model, layer_idx=0, n_layers=2).double()


@pytest.mark.parametrize(
    "kind", ["attention", "retention", "gla", "gated_delta_net", "delta_product", "mamba2", "rwkv7"]
)
def test_weights_times_values_rebuild_the_op_output(kind):
    mixer, x = built(kind), x_of().requires_grad_()
    with recorded() as calls:
        mixer(x)
    (call,) = calls
    queries = list(range(LENGTH))
    if kind == "delta_product":  # a token writes several values: only those of one are summed here
        assert head_weights(call, LENGTH, queries).shape == (2, call.output.shape[2], LENGTH, LENGTH)
        return
    weights, heads = head_weights(call, LENGTH, queries), call.output.shape[2]
    v = call.v.repeat_interleave(heads // call.v.shape[2], dim=2)
    torch.testing.assert_close(torch.einsum("bhqt,bthv->bqhv", weights, v), call.output)
    assert not weights.triu(1).any()
    if kind == "attention":
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, heads, LENGTH, dtype=torch.float64))


def test_query_heads_sharing_values_have_separate_weights():
    mixer, x = built("attention", n_heads=4, n_kv_heads=2), x_of()
    weights, exact = weights_of(mixer, x, [LENGTH - 1], PLAIN_CALL)
    assert exact
    assert weights.shape == (2, 4, 1, LENGTH)
    assert (weights[:, 0] - weights[:, 1]).abs().max() > 1e-3
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 1, dtype=torch.float64))


def constant_retention(gamma, heads=2):
    """Queries and keys that are the same at all tokens: only the decay is left of the weights."""
    config = RetentionConfig(n_heads=heads, decay="constant", gamma=gamma, rotation="none", row_norm=False)
    return config.build(24, layer_idx=0, n_layers=1).double()


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_reach_of_retention_matches_its_decay(gamma):
    x = torch.ones(1, 400, 24, dtype=torch.float64)
    weights, exact = weights_of(constant_retention(gamma), x, [399], PLAIN_CALL)
    assert exact
    torch.testing.assert_close(reach_of(weights, [399]), torch.full((2,), gamma / (1 - gamma), dtype=torch.float64))


DECAYS = {
    "fixed": FixedDecay(3, "geometric", None, learnable=True),
    "step": TimeStepDecay(3),
    "bounded": TimeStepDecay(3, lower_bound=-5.0),
    "by key": TimeStepDecay(3, key_dim=2),
}


@pytest.mark.parametrize("decays", DECAYS.values(), ids=DECAYS)
def test_set_reach_sets_decays_to_the_given_reach(decays):
    tokens = torch.tensor([2.0, 20.0, 200.0])
    assert decays.set_reach(tokens)
    if isinstance(decays, FixedDecay):
        found = decays(torch.device("cpu"))
    else:
        found = decays(torch.zeros(1, 1, *decays.dt_bias.shape))[1].reshape(3, -1)[:, 0]
    gamma = found.double().exp()
    torch.testing.assert_close(gamma / (1 - gamma), tokens.double(), rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", ["gla", "retention", "gated_delta_net"])
def test_mixer_set_reach_sets_decays_per_head(kind):
    learned = {"learnable_decay": True} if kind == "retention" else {}
    mixer = built(kind, n_heads=2, **learned)
    assert mixer.set_reach(torch.tensor([3.0, 30.0], dtype=torch.float64))
    with recorded() as calls:
        mixer(torch.zeros(1, 2, 24, dtype=torch.float64))
    decay = calls[0].log_decay.exp()
    by_head = decay if decay.ndim == 1 else decay[0, 0].reshape(2, -1).mean(1)
    wanted = torch.tensor([3.0, 30.0], dtype=torch.float64)
    torch.testing.assert_close(by_head / (1 - by_head), wanted, rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", ["attention", "retention", "gated_delta_net", "delta_product", "mamba2", "mamba3"])
def test_projections_are_views_by_role_and_head(kind):
    mixer = built(kind)
    weights = {p.untyped_storage().data_ptr() for p in mixer.parameters()}
    found = mixer.projections
    assert found.keys() == {*"qkvo"}
    assert all(view.untyped_storage().data_ptr() in weights and view.shape[2] == 24 for view in found.values())
    assert found["q"].shape[1] == found["k"].shape[1]
    assert found["v"].shape[1] == found["o"].shape[1]


def test_calls_are_recorded_only_inside_the_context():
    mixer, x = built("gla"), x_of()
    with recorded() as outer:
        with recorded() as inner:
            mixer(x)
        mixer(x)
    mixer(x)
    assert (len(outer), len(inner)) == (2, 1)
