"""Every built-in mixer meets the contract with all its options; a new mixer is included automatically."""

import pytest
from hypothesis import settings

from seqmix import MIXERS
from seqmix.mixers.retention import RetentionConfig
from seqmix.testing import check_mixer, parametrize_checks

pytestmark = pytest.mark.conformance

BUILT_IN = [kind for kind in MIXERS.kinds() if MIXERS.origin(kind).startswith("seqmix.")]
NIGHTLY = settings().max_examples > 100
FAMILIES = ["attention", "retention", "gated_delta_net", "rwkv7", "mamba", "hyena"]
"""One mixer of each op family, which meets every check of the contract."""
OWN = [
    *("paradigms_agree", "pieces_equal_the_whole", "steps_equal_the_whole", "gradients_flow_through_states"),
    *("documents_are_sequences", "gradients_of_documents_are_those_of_sequences", "gradients_are_derivatives"),
    *("a_state_has_the_declared_size", "rows_may_differ_in_length", "low_precision_is_near_float64"),
    *("every_option_changes_something", "every_parameter_is_initialised", "position_matters_only_where_declared"),
    *("flops_are_as_declared", "configurations_round_trip"),
]
"""What a mixer's own code can break; nightly every mixer meets every check, those of --stress too."""
OTHERS = [kind for kind in BUILT_IN if kind not in FAMILIES]
COMPILED = ["training_compiles_into_one_graph", "packing_compiles_into_one_graph", "decoding_compiles_once"]


def cases(kinds, checks=None):
    """A sixteenth of the drawn cases that `seqmix check` runs, beside all fixed ones; ten times as many nightly."""
    configs = [MIXERS.resolve(kind).example() for kind in kinds]
    examples = settings().max_examples // 16
    return parametrize_checks(configs, checks=checks, stress=NIGHTLY, examples=examples).args[1]


def slow(params):
    return [pytest.param(*param.values, id=param.id, marks=(*param.marks, pytest.mark.slow)) for param in params]


CASES = cases(BUILT_IN) if NIGHTLY else [*cases(FAMILIES), *cases(OTHERS, OWN), *slow(cases(OTHERS[::3], COMPILED[:1]))]


@pytest.mark.parametrize("check", CASES)
def test_every_mixer_passes_the_check(check, device):
    check(device=device)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_inductor_results_pass_the_check(name, device):
    report = check_mixer(RetentionConfig(n_heads=2), checks=[name], device=device, compile_backend="inductor")
    assert report.passed, report.failures[0].reason
