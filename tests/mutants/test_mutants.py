"""The kit tested by mutants: each wrong mixer and kernel fails the check named for it."""

from typing import Literal

import pytest
import torch
from hypothesis import settings
from mutants.registry import KERNEL_MUTANTS, MIXER_MUTANTS
from mutants.specimen import CachedConfig, Specimen, SpecimenConfig
from mutants.table import BEGIN, END, PAGE, tables
from pydantic import Field

from seqmix.ops.runtime.kernel import Kernel
from seqmix.testing import CHECKS, KERNEL_CHECKS, CheckFailure, Status, check_mixer

MUTANTS = [*MIXER_MUTANTS, *KERNEL_MUTANTS]
FEW = 10
NIGHTLY = settings().max_examples >= 1000
DEAR = {"IsAnotherWhereCompiledForMore"}
"""What is compiled for many sizes until it is caught: nightly alone."""


def name_of(mutant):
    return mutant.name


def chosen():
    """Of every check the first mutant, and every fourth of the others; all in the nightly profile."""
    of_checks = {}
    for mutant in MUTANTS:
        of_checks.setdefault((mutant.check, isinstance(mutant.subject, Kernel)), []).append(mutant)
    return [
        mutant
        for mutants in of_checks.values()
        for number, mutant in enumerate(mutants)
        if NIGHTLY or (number % 4 == 0 and mutant.name not in DEAR)
    ]


@pytest.mark.parametrize("mutant", chosen(), ids=name_of)
def test_each_mutant_is_caught_by_its_check(mutant):
    outcome = mutant.outcome()
    assert outcome.status is Status.FAILED
    # a property that does not hold, not a mutant that falls over
    with pytest.raises(CheckFailure):
        mutant.reproduce(outcome.case)


def test_every_check_has_a_mutant_and_the_page_lists_them():
    assert {mutant.check for mutant in MIXER_MUTANTS} == set(CHECKS)
    assert {mutant.check for mutant in KERNEL_MUTANTS} == set(KERNEL_CHECKS)
    listed = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert listed == tables(), "run: python tests/mutants/table.py"


class ListedConfig(SpecimenConfig):
    """Chunk sizes that are listed, and a parameter that is frozen."""

    kind: Literal["listed"] = "listed"
    chunk_size: Literal[32, 64] = 64

    def build(self, d_model, *, layer_idx, n_layers):
        mixer = super().build(d_model, layer_idx=layer_idx, n_layers=n_layers)
        mixer.in_proj.requires_grad_(False)
        return mixer


class TabledConfig(SpecimenConfig):
    """Chunk sizes that are tiles, and a table of the module that grows with the longest segment."""

    kind: Literal["tabled"] = "tabled"
    chunk_size: int = Field(default=128, ge=128, multiple_of=16)

    def build(self, d_model, *, layer_idx, n_layers):
        return Tabled(self, d_model)


class Tabled(Specimen):
    table = None

    def heads(self, x):
        if self.table is None or len(self.table) < x.shape[1]:
            with torch.inference_mode(False):  # training follows
                self.table = torch.ones(x.shape[1], dtype=torch.float64, device=x.device)
        return super().heads(x * self.table[: x.shape[1], None].to(x.dtype))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (SpecimenConfig(), {"examples": FEW, "compiles": NIGHTLY}),
        (CachedConfig(), {"examples": FEW, "compiles": NIGHTLY}),
        *((config(), {"examples": 5, "compiles": False}) for config in (ListedConfig, TabledConfig) if NIGHTLY),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_a_mixer_that_keeps_the_contract_passes_every_check(config, options):
    report = check_mixer(config, **options)
    assert [outcome.check.name for outcome in report.outcomes] == options.get("checks", list(CHECKS))
    assert {outcome.check.name: outcome.reason for outcome in report.failures} == {}
