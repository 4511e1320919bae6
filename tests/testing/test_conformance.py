"""Every built-in mixer keeps the contract, in all its options: a new one joins by its file alone."""

import pytest
from hypothesis import settings

from seqmix import MIXERS
from seqmix.mixers.retention import RetentionConfig
from seqmix.testing import check_mixer, parametrize_checks

pytestmark = pytest.mark.conformance

BUILT_IN = [kind for kind in MIXERS.kinds() if MIXERS.origin(kind).startswith("seqmix.")]
COMPILED = ["training_compiles_into_one_graph", "packing_compiles_into_one_graph", "decoding_compiles_once"]


# of two dozen mixers, each with an eighth of the drawn cases that `seqmix check` runs: what they share meets all of
# them; the nightly profile has ten times as many, and every fixed case always runs
@parametrize_checks([MIXERS.resolve(kind).example() for kind in BUILT_IN], examples=settings().max_examples // 8)
def test_conformance(check, device):
    check(device=device)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_inductor_computes_the_same(name, device):
    report = check_mixer(RetentionConfig(n_heads=2), checks=[name], device=device, compile_backend="inductor")
    assert report.passed, report.failures[0].reason
