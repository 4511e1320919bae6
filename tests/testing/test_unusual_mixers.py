"""The kit refuses no right mixer, however unlike the built-in ones."""

import pytest
import torch
from unusual import UNUSUAL, NoState

from seqmix import ContractError
from seqmix.testing import CHECKS, check_mixer


@pytest.mark.parametrize("config", UNUSUAL, ids=lambda config: config.kind)
def test_no_check_refuses_a_right_mixer(config):
    report = check_mixer(config, examples=8, compiles=False)
    assert [outcome.check.name for outcome in report.outcomes] == list(CHECKS)
    assert {outcome.check.name: outcome.reason for outcome in report.failures} == {}


def test_a_state_is_refused_where_the_parallel_paradigm_takes_none():
    mixer = NoState.config_class().build(12, layer_idx=0, n_layers=1)
    x = torch.ones(2, 3, 12)
    _, state = mixer(x, paradigm="parallel", return_state=True)
    with pytest.raises(ContractError, match=r"nostate takes no state in the parallel paradigm.* recurrent"):
        mixer(x, state, paradigm="parallel")
    mixer.cp_group = object()
    with pytest.raises(ContractError, match="takes no state in the parallel"):
        mixer(x, paradigm="parallel")
