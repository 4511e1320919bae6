"""The presets of every mixer, under identical conditions."""

from seqmix import MIXERS
from seqmix.training.presets import mixer_kind, single_kind_presets


def test_the_presets_have_one_mixer_each_and_identical_conditions():
    presets = single_kind_presets()
    assert {"retnet-tiny", "attention-tiny", "linear-tiny", "mamba2-tiny"} <= set(presets)
    assert "hybrid-tiny" not in presets
    assert {mixer_kind(config) for config in presets.values()} <= set(MIXERS.kinds())
    # batches are a function of these and of the seed
    reference = presets["retnet-tiny"]
    for config in presets.values():
        assert config.data == reference.data
        rate = {"learning_rate": reference.training.learning_rate}
        assert config.training.model_copy(update=rate) == reference.training
