"""The kit tested by mutants: each wrong mixer or kernel fails the check named for it."""

import pytest
from hypothesis import settings
from mutants.registry import KERNEL_MUTANTS, MIXER_MUTANTS
from mutants.specimen import CachedConfig, SpecimenConfig
from mutants.table import BEGIN, END, PAGE, tables

from seqmix.testing import CHECKS, KERNEL_CHECKS, CheckFailure, Status, check_mixer

MUTANTS = [*MIXER_MUTANTS, *KERNEL_MUTANTS]
FEW = 10
NIGHTLY = settings().max_examples >= 1000


@pytest.mark.slow
@pytest.mark.parametrize("seed", (0, 1, 2) if NIGHTLY else (0,))
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_fails_its_check(mutant, seed):
    outcome = mutant.outcome(seed)
    assert outcome.status is Status.FAILED
    # a property that does not hold, not a mutant that falls over
    with pytest.raises(CheckFailure):
        mutant.reproduce(outcome.case)


def test_every_check_has_a_mutant_and_the_page_is_current():
    assert {mutant.check for mutant in MIXER_MUTANTS} == set(CHECKS)
    assert {mutant.check for mutant in KERNEL_MUTANTS} == set(KERNEL_CHECKS)
    listed = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert listed == tables(), "run: python tests/mutants/table.py"


@pytest.mark.slow
@pytest.mark.parametrize("config", [SpecimenConfig(), CachedConfig()], ids=lambda config: config.kind)
def test_correct_specimen_passes_every_check(config):
    report = check_mixer(config, examples=FEW, stress=True, compiles=NIGHTLY)
    assert [outcome.check.name for outcome in report.outcomes] == list(CHECKS)
    assert {outcome.check.name: outcome.reason for outcome in report.failures} == {}
