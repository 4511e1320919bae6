"""The kernel checks are themselves checked: each wrong kernel fails the check named for it, and the report says how."""

import pytest
from mutants.kernels import HEALTHY, KERNEL_MUTANTS, caught, own_outcome

from seqmix.testing import KERNEL_CHECKS, Status, check_kernel

ALONE = {
    "outputs_are_the_definitions": "forgets_the_scale_in_inference",
    "gradients_are_the_definitions": "forgets_the_last_key_without_a_final_state",
    "a_cut_changes_nothing": "truncates_backpropagation",
    "a_carried_state_does_not_drift": "rounds_the_state",
    "results_are_deterministic": "adds_in_any_order",
    "inputs_are_left_alone": "writes_over_the_initial_state",
    "what_is_not_taken_is_refused": "ignores_the_initial_state",
    "tangents_are_right_or_refused": "has_a_tangent_of_zero",
    "dispatched_ops_pass_opcheck": "fakes_another_shape",
}
"""For every check a mutant that no other check catches."""

BY_NAME = {mutant.name: mutant for mutant in KERNEL_MUTANTS}


@pytest.mark.parametrize("name", BY_NAME)
def test_each_mutant_is_caught_by_its_check(name):
    mutant = BY_NAME[name]
    outcome = own_outcome(mutant)
    assert outcome.status is Status.FAILED
    assert mutant.says in outcome.reason
    assert f'reproduce_kernel("{mutant.check}", kernel, case)' in outcome.reason


@pytest.mark.parametrize("check", KERNEL_CHECKS)
def test_each_check_catches_what_no_other_does(check):
    assert caught(BY_NAME[ALONE[check]]) == {check}


def test_a_healthy_kernel_passes_every_check():
    outcomes = check_kernel(HEALTHY, examples=50).outcomes
    assert {outcome.check.name: outcome.reason for outcome in outcomes if outcome.status is not Status.PASSED} == {}
    assert [outcome.check.name for outcome in outcomes] == list(KERNEL_CHECKS)
