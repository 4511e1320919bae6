"""Trials, in which a check runs a mixer: layouts, parameters, states, memory limits, reports of causes and notes."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from unusual_mixers import Mesa

from seqmix.mixers.retention import RetentionConfig
from seqmix.testing import Case, Status, adapt, check_mixer, memory_limit, reproduce
from seqmix.testing.engine.run import cause_of
from seqmix.testing.gradients import strided, time_first, with_gradient_layout
from seqmix.testing.mixer.subject import Subject
from seqmix.testing.mixer.trial import Trial


@pytest.mark.parametrize("layout", [strided, time_first])
def test_gradient_arrives_with_the_requested_layout(layout):
    linear, strides = nn.Linear(4, 4), []
    y = linear(torch.ones(2, 3, 4))
    y.register_hook(lambda gradient: strides.append(gradient.stride()))
    (with_gradient_layout(y, layout) * torch.randn(2, 3, 4)).sum().backward()
    assert strides == [layout(torch.ones(2, 3, 4)).stride()]
    assert strides != [torch.ones(2, 3, 4).stride()]


def test_gru_receives_all_parameter_gradients_in_training_use():
    gru = adapt(lambda d: nn.GRU(d, d, batch_first=True), call=lambda gru, x, *_: (gru(x)[0], None), kind="GRU")
    trial = Trial(Subject(gru), Case(lengths=(3,), use="training"))
    y, _ = trial.mixer_in_use(trial.tokens())
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in trial.mixer.parameters())


class Memory(NamedTuple):
    h: torch.Tensor


def test_moved_mesa_state_stays_symmetric_positive_definite():
    """A symmetric matrix stays symmetric in a moved start state and along its derivatives."""
    trial = Trial(Subject(Mesa.config_class()), Case(lengths=(3,), start="moved", seed=3))
    gram = trial.state().gram
    torch.testing.assert_close(gram, gram.mT)
    torch.linalg.cholesky(gram)
    reproduce("gradients_are_derivatives", Mesa.config_class(), Case(lengths=(3,), start="moved", seed=3))


class Pairs(nn.Linear):
    """Causal, with a number for each pair of tokens, and `more` of them."""

    more = 0

    def __init__(self, d_model):
        super().__init__(d_model, d_model)

    def forward(self, x):
        pairs = torch.ones(len(x), x.shape[1], x.shape[1], dtype=x.dtype).tril()
        torch.ones(16 * self.more if x.shape[1] > 100 else 0)
        return super().forward(pairs @ x)


def test_case_that_needs_too_much_memory_is_skipped_with_a_reason(monkeypatch):
    # memory that earlier tests have freed stays in the process, and would be used without asking
    numbers = 2**26
    monkeypatch.setattr(memory_limit, "MAX_BYTES", 4 * numbers)
    monkeypatch.setattr(Pairs, "more", numbers)
    (outcome,) = check_mixer(adapt(Pairs), checks=["long_segments_do_not_drift"], examples=1).outcomes
    assert outcome.status is Status.SKIPPED
    assert "needs more than" in outcome.reason


def test_cache_in_the_autocast_dtype_passes_with_a_note():
    def call(linear, x, state, *_):
        keys = linear(x)
        keys = keys if state is None else torch.cat((state.h.to(keys.dtype), keys), dim=1)
        before = keys.shape[1] - x.shape[1]
        unseen = torch.ones(x.shape[1], keys.shape[1]).triu(1 + before).bool()
        weights = (x @ keys.to(x.dtype).mT).masked_fill(unseen, -torch.inf).softmax(-1)
        return (weights @ keys.to(x.dtype)).to(x.dtype), Memory(keys)

    config = adapt(
        lambda d: nn.Linear(d, d),
        call=call,
        state=lambda linear, rows: Memory(linear.weight.new_zeros(rows, 0, linear.in_features)),
        traits={"state": "growing"},
        kind="cached",
    )
    (outcome,) = check_mixer(config, checks=["autocast_changes_only_precision"], examples=10).outcomes
    assert outcome.status is Status.PASSED, outcome.reason
    assert any("expected the state's h in torch.float32, got torch.bfloat16" in note for note in outcome.notes)


def test_failures_with_one_cause_are_reported_once(mixing):
    def broken(inner, x, call):
        if x.shape[1] > 4:
            raise KeyError("no such weight")
        return inner(x, call)

    names = ["paradigms_agree", "pieces_equal_the_whole", "rows_are_independent"]
    first, *others = check_mixer(mixing(broken), checks=names, shrink=False).failures
    assert "To reproduce:" in first.reason
    assert [outcome.same_as for outcome in (first, *others)] == ["", *[first.check.name] * len(others)]
    start = "fails for the same cause as paradigms_agree: raised KeyError"
    assert all(outcome.reason.startswith(start) for outcome in others)
    assert cause_of("a: off by 1.5e-3 in 3 of 4") == cause_of("a: off by 2 in 1 of 9") != cause_of("b: off by 2")


def test_every_option_is_tried_even_with_few_examples():
    config = RetentionConfig(n_heads=2)
    (outcome,) = check_mixer(config, checks=["position_matters_only_where_declared"], examples=1).outcomes
    assert outcome.examples > len(Subject(config).single_options)
