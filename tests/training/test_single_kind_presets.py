"""Presets that use a single kind of mixer."""

from seqmix import MIXERS
from seqmix.training.presets import mixer_kind, single_kind_presets


def test_single_kind_presets_use_one_mixer_each():
    presets = single_kind_presets()
    assert {"retnet-tiny", "attention-tiny", "linear-tiny", "mamba2-tiny"} <= set(presets)
    assert "hybrid-tiny" not in presets
    assert {mixer_kind(config) for config in presets.values()} <= set(MIXERS.kinds())
