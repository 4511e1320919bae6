"""A thread that reads one step ahead yields the same batches and errors as reading on request."""

import threading

import pytest
import torch
from small_runs import refusal, require_same_run, run_of, stopped
from torch.testing import assert_close

from seqmix import SeqmixError
from seqmix.data import Batch
from seqmix.training import trainer
from seqmix.training.loader import Loader

CPU = torch.device("cpu")


class Numbers:
    """Data whose batches have the number of their step; those from `broken` on cannot be read."""

    def __init__(self, broken=100):
        self.broken, self.read, self.threads, self.place = broken, [], set(), None

    def training_batch(self, step, batch_size, seed, rank, world_size):
        assert (seed, rank, world_size) == (0, 0, 1)
        self.read.append(step)
        self.threads.add(threading.current_thread().name)
        if step >= self.broken:
            raise SeqmixError(f"block {step} of a.tokens is damaged")
        self.place = {"after": step}
        return Batch(*(torch.full((batch_size, 4), step) for _ in range(2)))

    def state_dict(self):
        return self.place


def test_loader_reads_one_step_ahead_but_reports_the_current_place(config_of):
    source = Numbers()
    loader = Loader(config_of("training.steps=4", "training.warmup_steps=1"), source, CPU, reads_ahead=True)
    assert loader.state_dict() is None
    for step in (0, 0, 1, 2, 3, 3, 1):  # as after an error, which is looked for in the same step
        assert loader.batch(step).inputs.unique().tolist() == [step]
        assert loader.state_dict() == {"after": step}
    (name,) = source.threads
    assert name.startswith("batches")
    loader.batch(2)
    assert source.read[:4] == [0, 1, 2, 3]
    assert max(source.read) == 3  # nothing after the last step


def test_nothing_is_read_ahead_on_cpu(config_of):
    source = Numbers()
    loader = Loader(config_of(), source, CPU)
    loader.batch(0)
    assert (source.read, loader.state_dict(), source.threads) == ([0], {"after": 0}, {"MainThread"})


def test_read_ahead_error_is_raised_when_its_step_is_requested(config_of):
    loader = Loader(config_of("training.steps=4", "training.warmup_steps=1"), Numbers(broken=2), CPU, reads_ahead=True)
    loader.batch(0)
    loader.batch(1)
    assert loader.state_dict() == {"after": 1}
    assert refusal(lambda: loader.batch(2)) == "block 2 of a.tokens is damaged"


@pytest.mark.parametrize("changes", [("data.order=epochs",), ("training.carry_state=true",), ("data.packing=true",)])
def test_stopped_run_that_reads_ahead_resumes_bitwise(config_of, tmp_path, monkeypatch, changes):
    config = config_of(*changes, "training.steps=6", "training.checkpoint_every=3")
    run_of(config, tmp_path / "whole")
    monkeypatch.setattr(trainer, "Loader", lambda *arguments: Loader(*arguments, reads_ahead=True))
    stopped(config, tmp_path / "run", 4)
    run_of(config, tmp_path / "run", resume=True)
    require_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_for_a_gpu_are_pinned(config_of):
    loader = Loader(config_of(), source := Numbers(), torch.device("cuda", 0))
    batch, _ = loader._read(0)
    assert batch.inputs.is_pinned()
    assert_close(loader.batch(0).inputs.cpu(), source.training_batch(0, len(batch.inputs), 0, 0, 1).inputs)
