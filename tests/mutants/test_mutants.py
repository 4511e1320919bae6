"""The conformance kit is itself checked: each wrong mixer fails the check named for it, and the page says so."""

from typing import Literal

import pytest
import torch
from hypothesis import settings
from mutants.kernels import KERNEL_MUTANTS
from mutants.mixers import FEW, MUTANTS, fails
from mutants.specimen import CachedConfig, Specimen, SpecimenConfig
from mutants.table import OVERLAPS, PAGE, generated, of_kernels, of_mixers, read
from pydantic import Field

from seqmix.testing import CHECKS, CheckFailure, check_mixer, reproduce

TABLES = generated(PAGE.read_text())
WRONG_MIXERS = {row.name: row for row in read("Wrong mixers", TABLES)}
WRONG_KERNELS = {row.name: row for row in read("Wrong kernels", TABLES)}
STALE = "run: python tests/mutants/table.py"
FEWEST = 5

all_mutants = pytest.mark.parametrize("mutant", MUTANTS.values(), ids=list(MUTANTS))


@pytest.mark.parametrize("config", [SpecimenConfig(), CachedConfig()], ids=lambda config: config.kind)
def test_a_healthy_specimen_passes_every_check(config):
    report = check_mixer(config, examples=FEW)
    assert [outcome.check.name for outcome in report.outcomes] == list(CHECKS)
    assert {outcome.check.name: outcome.reason for outcome in report.failures} == {}


class SixteensConfig(SpecimenConfig):
    kind: Literal["sixteens"] = "sixteens"
    chunk_size: int = Field(default=64, ge=16, multiple_of=16)


class LargeConfig(SpecimenConfig):
    kind: Literal["large"] = "large"
    chunk_size: int = Field(default=128, ge=128)


class ListedConfig(SpecimenConfig):
    kind: Literal["listed"] = "listed"
    chunk_size: Literal[32, 64] = 64


class FrozenConfig(SpecimenConfig):
    kind: Literal["frozen"] = "frozen"

    def build(self, d_model, *, layer_idx, n_layers):
        mixer = super().build(d_model, layer_idx=layer_idx, n_layers=n_layers)
        mixer.in_proj.requires_grad_(False)
        return mixer


class TabledConfig(SpecimenConfig):
    kind: Literal["tabled"] = "tabled"

    def build(self, d_model, *, layer_idx, n_layers):
        return Tabled(self, d_model)


class Tabled(Specimen):
    """A table is made where one is needed, and again where it is too short."""

    table = None

    def heads(self, x):
        if self.table is None or len(self.table) < x.shape[1]:
            self.table = torch.ones(x.shape[1], dtype=torch.float64)
        return super().heads(x * self.table[: x.shape[1], None].to(x.dtype))


@pytest.mark.parametrize("config", [SixteensConfig, LargeConfig, ListedConfig, FrozenConfig, TabledConfig])
def test_what_is_allowed_passes_every_check(config):
    report = check_mixer(config(), examples=FEWEST, compiles=False)
    assert {outcome.check.name: outcome.reason for outcome in report.failures} == {}


@all_mutants
def test_each_mutant_is_caught_by_its_check(mutant):
    found = fails(mutant, mutant.check)
    assert found is not None
    # a property that does not hold, not a mutant that falls over
    with pytest.raises(CheckFailure):
        reproduce(mutant.check, mutant.config, found.case)


def test_every_check_has_a_mutant_that_it_alone_catches():
    assert {mutant.check for mutant in MUTANTS.values()} == set(CHECKS)
    alone = {row.check for row in WRONG_MIXERS.values() if not row.also}
    assert alone | set(OVERLAPS) == set(CHECKS)
    assert not alone & set(OVERLAPS)


# ---- the tables of docs/appendix/mutants.md


def test_the_page_lists_the_mutants():
    for mutants, rows in ((MUTANTS.values(), WRONG_MIXERS), (KERNEL_MUTANTS, WRONG_KERNELS)):
        assert [row[:3] for row in rows.values()] == [(m.name, m.wrong, m.check) for m in mutants], STALE
    assert f"{of_mixers(WRONG_MIXERS.values())}\n\n{of_kernels(WRONG_KERNELS.values())}" == TABLES, STALE


@all_mutants
def test_the_page_names_the_checks_that_catch_it_too(mutant):
    """That no other does is left to --hypothesis-profile nightly: it takes all of them."""
    also, nightly = WRONG_MIXERS[mutant.name].also, settings().max_examples >= 1000
    asked = CHECKS if nightly else also
    others = [name for name in asked if name != mutant.check and not CHECKS[name].compiles]
    # what does not catch it runs to the end, so with fewer examples
    found = [name for name in others if fails(mutant, name, FEW if name in also else FEWEST)]
    assert found == list(also), STALE
