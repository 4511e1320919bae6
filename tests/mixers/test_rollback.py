"""Rollback: what the kit's check `a_state_goes_back` leaves out."""

import pytest
import torch
from torch.testing import assert_close

from seqmix import ContractError
from seqmix.mixers.attention import AttentionConfig
from seqmix.mixers.retention import RetentionConfig


def built(config):
    torch.manual_seed(0)
    return config.build(16, layer_idx=0, n_layers=1).double().eval()


def segments(*lengths, rows=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, length, 16, dtype=torch.float64, generator=generator) for length in lengths]


@pytest.mark.parametrize(
    "config", [RetentionConfig(n_heads=2), AttentionConfig(n_heads=2)], ids=["constant", "growing"]
)
def test_rollback_with_constant_count_compiles_to_one_graph(config):
    mixer = built(config)
    first, middle = segments(5, 7)
    with torch.no_grad():
        _, before = mixer(first, mixer.init_state(2, max_length=20), return_state=True)
        _, after = mixer(middle, before, return_state=True)
        compiled = torch.compile(lambda *states: mixer.rollback(middle, *states, 3), fullgraph=True, backend="eager")
        back = compiled(before, after)
        expected = mixer(torch.cat((first, middle[:, :4]), dim=1), return_state=True)[1]
        following = segments(6)[0]
        assert_close(mixer(following, back)[0], mixer(following, expected)[0])


def test_rollback_gradients_reach_only_the_kept_tokens():
    mixer = built(RetentionConfig(n_heads=2))
    first, middle = segments(5, 7)
    middle.requires_grad_()
    _, before = mixer(first, return_state=True)
    _, after = mixer(middle, before, return_state=True)
    mixer.rollback(middle, before, after, torch.tensor([2, 7])).memory.sum().backward()
    assert middle.grad[0, :5].any(-1).all()
    assert not middle.grad[0, 5:].any()
    assert not middle.grad[1].any()


@pytest.mark.parametrize("tokens", [8, -1, torch.tensor([1, 2, 3]), torch.tensor([1, 8])], ids=str)
def test_invalid_rollback_token_count_raises(tokens):
    for config in (RetentionConfig(n_heads=2), AttentionConfig(n_heads=2)):
        mixer = built(config)
        (segment,) = segments(7)
        _, after = mixer(segment, return_state=True)
        with pytest.raises(ContractError, match=f"{config.kind}: rollback expects"):
            mixer.rollback(segment, None, after, tokens)
