"""A sample of every group of hostile input, or all of it with --hypothesis-profile nightly (see tally.py)."""

import random

import pytest
from abuse.groups import ALONE, GROUPS, SLOW
from abuse.tally import Case, Tally, fault_of
from hypothesis import settings
from nightly import NIGHTLY

from seqmix import SeqmixError

pytestmark = pytest.mark.slow

SAMPLE = 8
"""Number of cases tried per group in every run."""


@pytest.mark.parametrize("group", [pytest.param(name, marks=NIGHTLY if name in SLOW else ()) for name in GROUPS])
def test_sampled_abuse_cases_have_no_faults(group, tmp_path):
    cases = list(GROUPS[group](tmp_path, random.Random(0)))
    if settings().max_examples < 1000:
        cases = random.Random(group).sample(cases, min(SAMPLE, len(cases)))
    tally = Tally()
    for case in cases:
        tally.add(case, 250 if group in SLOW else 60, alone=group in ALONE)
    assert tally.tried == len(cases) > 0
    assert not tally.faults


def test_fault_of_accepts_only_short_seqmix_errors_as_refusals():
    def fail(error: BaseException) -> None:
        raise error

    assert fault_of(Case("", lambda: fail(SeqmixError("a sentence")))) is None
    assert fault_of(Case("", lambda: None)) == "it was used"
    assert fault_of(Case("", lambda: None, refused=False)) is None
    assert "KeyError" in str(fault_of(Case("", lambda: fail(KeyError("x")))))
    assert "not a sentence" in str(fault_of(Case("", lambda: fail(SeqmixError("\n".join("abcdefgh"))))))
    assert "too long" in str(fault_of(Case("", lambda: fail(TimeoutError("too long")))))
