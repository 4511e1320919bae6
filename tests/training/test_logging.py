"""Where metrics are written."""

import sys

import pytest
from runs import metrics, refusal, run_of


def test_without_tensorboard_nothing_of_it_is_imported(config_of, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert run_of(config_of("training.steps=2"), tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()
    message = refusal(lambda: run_of(config_of("training.tensorboard=true"), tmp_path / "other"))
    assert "seqmix[tensorboard]" in message
    assert not (tmp_path / "other").exists()


def test_tensorboard_has_the_same_numbers(config_of, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of("training.tensorboard=true", "training.evaluation_lengths=[8]", "training.steps=2")
    run_of(config, tmp_path / "run")
    board, written = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload(), metrics(tmp_path / "run")
    losses = [(line["step"], pytest.approx(line["loss"])) for line in written if "loss" in line]
    assert [(x.step, x.value) for x in board.Scalars("loss")] == losses
    (last,) = board.Scalars("validation_loss_by_length/8")
    assert last.value == pytest.approx(written[-1]["validation_loss_by_length"]["8"])
    assert {"learning_rate", "gradient_norm", "tokens_per_second", "validation_loss"} <= set(board.Tags()["scalars"])
