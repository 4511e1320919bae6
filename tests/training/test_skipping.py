"""Skipped steps: they are counted, leave the parameters unchanged, and are the same after a resume."""

import math

import pytest
import torch
from small_runs import metrics, refusal, require_same_run, run_of, stopped, trainer_of

from seqmix.training.checkpoint.errors import TrainingError
from seqmix.training.monitoring.events import Noted, Stepped
from seqmix.training.nonfinite import NotFiniteError
from seqmix.training.objective import Objective
from seqmix.training.skipping import MIN_NORMS, WINDOW, Skipping


class Failing(Objective):
    """The cross-entropy, but of the third step: NaN there, or a hundredfold."""

    def __init__(self, factor: float, at: int = 2) -> None:
        self.factor, self.at, self.calls = factor, at, 0

    def __call__(self, model, batch, state):
        output = super().__call__(model, batch, state)
        if model.training:
            self.calls += 1
        return (
            output._replace(loss=self.factor * output.loss) if model.training and self.calls == self.at + 1 else output
        )


def parameters(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("option", ["training.skip_nonfinite=true", "training.max_grad_norm_spike=5.0"])
def test_skipped_step_changes_no_parameter_but_the_next_one_does(config_of, option, monkeypatch):
    monkeypatch.setattr("seqmix.training.skipping.MIN_NORMS", 2)
    trainer = trainer_of(config_of(option))
    trainer.objective = Failing(math.nan if "nonfinite" in option else 100.0)
    for step in range(4):
        before = parameters(trainer)
        result = trainer.train_step(step)
        changed = any(not torch.equal(a, b) for a, b in zip(before, parameters(trainer), strict=True))
        assert changed == (step != 2)
        assert (result.skipped is not None) == (step == 2)
    assert trainer.skipping.skipped == 1


def test_run_notes_and_counts_skipped_steps(config_of, tmp_path):
    config = config_of("training.skip_nonfinite=true", "training.log_every=1")
    events = run_of(config, tmp_path / "run", objective=Failing(math.nan))
    (said,) = (event for event in events if isinstance(event, Noted))
    assert said.text.startswith("step 3 is skipped: the loss is nan")
    counts = [event.skipped_steps for event in events if isinstance(event, Stepped)]
    assert counts[:4] == [0, 0, 1, 1]
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run") if "skipped_steps" in line][:4] == counts[:4]
    # unasked, it ends
    plain = config_of()
    said = refusal(lambda: run_of(plain, tmp_path / "plain", objective=Failing(math.nan)), TrainingError)
    assert "the loss is nan" in said


def test_too_many_nonfinite_steps_in_a_row_raise(config_of, monkeypatch):
    monkeypatch.setattr("seqmix.training.skipping.MAX_NONFINITE_IN_A_ROW", 2)
    trainer = trainer_of(config_of("training.skip_nonfinite=true"))
    trainer.objective = Failing(math.nan)
    assert [trainer.train_step(step).skipped is None for step in range(4)] == [True, True, False, True]
    with torch.no_grad():
        trainer.model.head.weight.fill_(math.inf)
    assert trainer.train_step(4).skipped
    assert trainer.train_step(5).skipped
    with pytest.raises(NotFiniteError, match="the loss is nan"):
        trainer.train_step(6)


def test_resumed_run_remembers_recent_gradient_norms(config_of, tmp_path, monkeypatch):
    monkeypatch.setattr("seqmix.training.skipping.MIN_NORMS", 4)
    config = config_of("training.max_grad_norm_spike=5.0")
    events = run_of(config, tmp_path / "whole", objective=Failing(100.0, at=4))
    (said,) = (event for event in events if isinstance(event, Noted))
    assert said.step == 5
    stopped(config, tmp_path / "parts", 3)
    run_of(config, tmp_path / "parts", resume=True, objective=Failing(100.0, at=1))
    require_same_run(tmp_path / "parts", tmp_path / "whole")


def test_spike_is_a_norm_above_a_multiple_of_the_median(config_of):
    skipping = Skipping(config_of("training.max_grad_norm_spike=3.0").training)
    for norm in (1.0, 100.0, *[1.0] * (MIN_NORMS - 2)):
        assert skipping.reason(norm) is None  # too few to be unusual
    assert "4, 4 times the median of the last 16 steps" in skipping.reason(4.0)
    assert skipping.reason(2.9) is None
    for _ in range(WINDOW):
        assert skipping.reason(2.9) is None
    assert skipping.reason(4.0) is None  # what is usual moves
    assert Skipping(config_of().training).reason(math.inf) is None
