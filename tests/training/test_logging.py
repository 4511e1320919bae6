"""Where measurements go."""

import json
import sys

import pytest

from seqmix import SeqmixError, train
from seqmix.training.logging import Metrics


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_measurements_behind_a_step_are_forgotten(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.begin(0)
    for step in range(1, 5):
        metrics.record({"step": step, "loss": float(step)})
    metrics.begin(2)
    metrics.record({"step": 3, "loss": 0.5})
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 0.5}]


def test_without_tensorboard_nothing_of_it_is_imported(config_of, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert list(train(config_of("training.steps=2"), tmp_path / "run"))
    assert not (tmp_path / "run" / "tensorboard").exists()
    with pytest.raises(SeqmixError, match=r"needs the package tensorboard.* pip install 'seqmix\[tensorboard\]'"):
        list(train(config_of("training.tensorboard=true"), tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_tensorboard_has_the_same_numbers(config_of, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_of("training.tensorboard=true", "training.evaluation_lengths=[8]", "training.steps=2")
    list(train(config, tmp_path / "run"))
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    written = lines(tmp_path / "run")
    losses = [line["loss"] for line in written if "loss" in line]
    assert [(x.step, x.value) for x in board.Scalars("loss")] == [
        (step, pytest.approx(loss)) for step, loss in enumerate(losses, start=1)
    ]
    (last,) = board.Scalars("validation_loss_by_length/8")
    assert last.value == pytest.approx(written[-1]["validation_loss_by_length"]["8"])
    assert {"learning_rate", "gradient_norm", "tokens_per_second", "validation_loss"} <= set(board.Tags()["scalars"])
