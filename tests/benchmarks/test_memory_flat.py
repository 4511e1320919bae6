"""Memory that does not grow, and the measurement that would see it grow."""

import torch

from seqmix.benchmarks.memory_flat import ALLOWED, Held, growth, measured, settled
from seqmix.training.trainer import Trainer


def test_nothing_comes_to_stay(tmp_path):
    held = settled(list(measured(60, tmp_path)))
    assert [each.step for each in held] == [10, 20, 30, 40, 50]
    assert len({each.tensors for each in held}) == 1
    assert all(0 < each.bytes <= each.peak + 2**20 for each in held)


def test_a_tensor_that_stays_is_seen(tmp_path, monkeypatch):
    kept, step = [], Trainer.train_step

    def leaking(self: Trainer, number: int):
        kept.append(torch.ones(2**18))  # more than what tests before this one have freed in small pieces
        return step(self, number)

    monkeypatch.setattr(Trainer, "train_step", leaking)
    held = settled(list(measured(60, tmp_path)))
    assert [each.tensors - held[0].tensors for each in held] == [0, 10, 20, 30, 40]
    assert growth(held) > ALLOWED


def test_growth_is_that_of_a_line():
    held = [Held(step, 1000 + 3 * step, 0, 0) for step in range(0, 100, 10)]
    assert round(growth(held)) == 270
    assert settled(held)[0].step == 10
