"""The kit accepts correct mixers that differ from the built-in ones, and errors name the trait that excludes a use."""

import pytest
import torch
from hypothesis import settings
from unusual_mixers import UNUSUAL, Counted, LogSpaceGRU, NoState, TorchGRU, Unusual

from seqmix import ContractError
from seqmix.testing import CHECKS, Case, CheckFailure, check_mixer, reproduce
from seqmix.testing.compare import Differences

NIGHTLY = settings().max_examples >= 1000
SLOW = {"thousands_of_tokens_agree", "long_segments_do_not_drift", "long_decoding_does_not_drift"}
"""These mixers are loops over tokens in Python: thousands of them in the nightly profile alone."""
ASKED = [name for name in CHECKS if NIGHTLY or name not in SLOW]


@pytest.mark.slow
@pytest.mark.parametrize("config", UNUSUAL, ids=lambda config: config.kind)
def test_correct_unusual_mixer_passes_all_checks(config):
    report = check_mixer(config, checks=ASKED, examples=40 if NIGHTLY else 4, compiles=NIGHTLY)
    assert {outcome.check.name: outcome.reason for outcome in report.failures} == {}


def test_log_space_state_may_round_at_every_token():
    """A log-space state accumulates one unit of roundoff per token over 2,049 tokens."""
    case = Case(lengths=(2049,), dtype=torch.float32, start="initial", seed=1)
    reproduce("long_segments_do_not_drift", LogSpaceGRU.config_class(), case)


def test_passing_a_state_to_a_stateless_parallel_paradigm_raises():
    mixer = NoState.config_class().build(12, layer_idx=0, n_layers=1)
    x = torch.ones(2, 3, 12)
    _, state = mixer(x, paradigm="parallel", return_state=True)
    with pytest.raises(ContractError, match=r"nostate takes no state in the parallel paradigm.* recurrent"):
        mixer(x, state, paradigm="parallel")
    mixer.cp_group = object()
    with pytest.raises(ContractError, match="takes no state in the parallel"):
        mixer(x, paradigm="parallel")


def test_compiling_an_uncompilable_mixer_raises_with_its_name():
    mixer = TorchGRU.config_class().build(12, layer_idx=0, n_layers=1)
    with pytest.raises(Exception, match=r"torchgru cannot be compiled \(traits.compiles is False\)"):
        torch.compile(mixer, fullgraph=True, backend="eager")(torch.ones(2, 3, 12))


def test_dependence_on_position_is_detected(failure):
    class Counts(Unusual, right=False):
        def init_state(self, batch_size, *, max_length=None):
            return Counted(self.zeros(batch_size, self.width), self.zeros(batch_size, dtype=torch.int64))

        def shift_state(self, state, tokens):
            return state

        def token(self, u, state):
            h = state.memory / 2 + u
            return h * state.position.to(u.dtype).cos()[:, None], Counted(h, state.position + 1)

    outcome = failure(Counts.config_class(), "position_matters_only_where_declared")
    assert "840 tokens later, which changed position alone" in outcome.reason


def test_complex_numbers_are_compared_within_the_tolerance():
    z = torch.complex(torch.linspace(-1, 1, 5), torch.ones(5)).to(torch.complex128)
    with Differences("steps", 1e-9) as found:
        found.tensor("the state", z * (1 + 1e-15), z)
    with pytest.raises(CheckFailure, match=r"the state differs .*off by up to 0\.001 in 5 of 5 elements"), found:
        found.tensor("the state", z + 1e-3, z)


def test_non_finite_values_are_reported_even_with_a_nan_tolerance():
    x = torch.full((2,), torch.nan)
    not_finite = pytest.raises(CheckFailure, match=r"not finite on either side .* in 2 of 2 elements")
    with not_finite, Differences("steps", 1e-9, {"the state": torch.nan}) as found:
        found.tensor("the state", x, x)
