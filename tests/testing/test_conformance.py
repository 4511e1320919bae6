"""Every built-in mixer keeps the contract, in all its options: a new one joins by its file alone."""

import pytest
from hypothesis import settings

from seqmix import MIXERS
from seqmix.mixers.retention import RetentionConfig
from seqmix.testing import CHECKS, check_mixer, parametrize_checks

pytestmark = pytest.mark.conformance

BUILT_IN = [kind for kind in MIXERS.kinds() if MIXERS.origin(kind).startswith("seqmix.")]
NIGHTLY = settings().max_examples > 100
FAMILIES = ["attention", "retention", "gated_delta_net", "rwkv7", "mamba", "hyena"]
DEAR = [
    "graphs_follow_sizes",
    "packing_compiles_into_one_graph",
    "decoding_compiles_once",
    "thousands_of_tokens_agree",
    "long_segments_do_not_drift",
    "long_decoding_does_not_drift",
    "gradients_of_a_batch_are_sums_over_its_rows",
    "segments_compile_into_one_graph",
    "exported_graphs_are_the_mixer",
]
OWN = [
    *("paradigms_agree", "pieces_equal_the_whole", "steps_equal_the_whole", "gradients_flow_through_states"),
    *("documents_are_sequences", "gradients_of_documents_are_those_of_sequences", "gradients_are_derivatives"),
    *("a_state_has_the_declared_size", "rows_may_differ_in_length", "low_precision_is_near_float64"),
    *("every_option_changes_something", "every_parameter_is_initialised", "every_parameter_learns"),
    *("flops_are_as_declared", "configurations_round_trip"),
]
OTHERS = [kind for kind in BUILT_IN if kind not in FAMILIES]
COMPILED = ["training_compiles_into_one_graph", "packing_compiles_into_one_graph", "decoding_compiles_once"]


def cases(kinds, checks):
    """A sixteenth of the drawn cases that `seqmix check` runs, beside all fixed ones; ten times as many nightly."""
    configs = [MIXERS.resolve(kind).example() for kind in kinds]
    return parametrize_checks(configs, checks=checks, examples=settings().max_examples // 16).args[1]


# every check meets one mixer of each op family, every mixer what its own code can break, every third a compiler (whole
# models are compiled of nine kinds, in tests/models); nightly all meet all
@pytest.mark.parametrize(
    "check",
    [
        *cases(BUILT_IN if NIGHTLY else FAMILIES, [name for name in CHECKS if name not in DEAR]),
        *([] if NIGHTLY else [*cases(OTHERS, OWN), *cases(OTHERS[::3], COMPILED[:1])]),
    ],
)
def test_conformance(check, device):
    check(device=device)


# they compile often, or read thousands of tokens: of each op family one mixer, and all in the nightly profile
@parametrize_checks(
    [MIXERS.resolve(kind).example() for kind in (BUILT_IN if NIGHTLY else FAMILIES)],
    checks=DEAR,
    examples=settings().max_examples // 8,
)
def test_conformance_that_takes_long(check, device):
    check(device=device)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_inductor_computes_the_same(name, device):
    report = check_mixer(RetentionConfig(n_heads=2), checks=[name], device=device, compile_backend="inductor")
    assert report.passed, report.failures[0].reason
