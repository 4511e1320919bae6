"""Mixers side by side: a sum of mixers, each with its own state. Incompatible combinations raise."""

import pickle

import pytest
import torch

from seqmix import ContractError, Paradigm, SeqmixError, load_config
from seqmix.mixers.parallel_hybrid import ParallelHybridConfig

RETENTION = {"kind": "retention", "n_heads": 2, "chunk_size": 3}
ATTENTION = {"kind": "attention", "n_heads": 2}
HYENA = {"kind": "hyena"}
DELTA = {"kind": "delta_net", "n_heads": 2}


def test_output_is_the_scaled_sum_of_its_mixers():
    config = ParallelHybridConfig(mixers=[RETENTION, ATTENTION, DELTA], scales=[1.0, 0.5, 2.0])
    mixer = config.build(16, layer_idx=0, n_layers=1).double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    y, state = mixer(x, return_state=True)
    each = [part(x, paradigm="chunkwise", return_state=True) for part in mixer.mixers]
    expected = each[0][0] + 0.5 * each[1][0] + 2 * each[2][0]
    torch.testing.assert_close(y, expected)
    assert type(state)._fields == ("mixer_0", "mixer_1", "mixer_2")
    torch.testing.assert_close(state.mixer_2.memory, each[2][1].memory)
    assert isinstance(pickle.loads(pickle.dumps(state)), type(state))


def test_traits_combine_those_of_its_mixers():
    traits = ParallelHybridConfig(mixers=[RETENTION, ATTENTION]).traits
    assert (traits.paradigms, traits.state) == (frozenset(Paradigm), "growing")
    traits = ParallelHybridConfig(mixers=[DELTA, {**ATTENTION, "window": 4}]).traits
    assert (traits.paradigms, traits.state) == ({Paradigm.RECURRENT, Paradigm.CHUNKWISE}, "constant")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixers": [RETENTION]}, "a length >= 2"),
        ({"mixers": [RETENTION, HYENA]}, "no paradigm 'chunkwise'; it declares parallel, recurrent"),
        ({"mixers": [RETENTION, ATTENTION], "scales": [1.0]}, "2 factors, one per mixer, got 1"),
        ({"mixers": [RETENTION, {"kind": "retentoin"}]}, "did you mean"),
    ],
    ids=str,
)
def test_invalid_or_incompatible_mixers_raise(fields, message):
    with pytest.raises(SeqmixError, match=message):
        ParallelHybridConfig(**fields)


def test_error_names_the_mixer_that_does_not_fit():
    config = ParallelHybridConfig(mixers=[RETENTION, {**ATTENTION, "n_heads": 3}])
    with pytest.raises(ContractError, match=r"mixers\.1: 3 heads do not divide"):
        config.build(16, layer_idx=0, n_layers=1)


def test_yaml_config_nests_mixers():
    mixer = load_config("parallel-hybrid-tiny").model.blocks["both"].mixer
    assert [part.kind for part in mixer.mixers] == ["attention", "mamba2"]
