"""System errors during a run name a remedy, and the run can resume from its newest checkpoint."""

import re
import resource
from pathlib import Path

import pytest
import torch
from small_runs import refusal, run_of, stopped

from seqmix import train
from seqmix.models import is_out_of_memory
from seqmix.training import TrainingError, read_config
from seqmix.training.checkpoint.files import checkpoints
from seqmix.training.monitoring.events import Evaluated, Saved, Stepped
from seqmix.training.trainer import Trainer

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "8589934592 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8 GiB.")
NUMPY = MemoryError("Unable to allocate 8.00 TiB for an array with shape (1099511627776,) and data type float64")
CHECKPOINTING = "training.activation_checkpointing"


def failing(config, run: Path, at: type, step: int, break_it) -> str:
    """Train until an event, break something, and go on: the error."""

    def train_and_break() -> None:
        for event in train(config, run):
            if isinstance(event, at) and event.step == step:
                break_it()

    return refusal(train_and_break)


@pytest.mark.parametrize(
    ("error", "asked", "saved"),
    [(CPU, "8.0 GiB", "false"), (CUDA, "2.50 GiB", "false"), (NUMPY, "8.00 TiB", "false"), (MemoryError(), "", "true")],
)
def test_out_of_memory_error_names_remedies_and_the_newest_checkpoint(
    config_of, tmp_path, monkeypatch, error, asked, saved
):
    def fail(self: Trainer, step: int) -> None:
        raise error

    config, run = config_of("training.grad_accum_steps=2", f"{CHECKPOINTING}={saved}"), tmp_path / "run"
    message = failing(config, run, Stepped, 3, lambda: monkeypatch.setattr(Trainer, "train_step", fail))
    assert message.startswith("out of memory")
    assert asked in message
    assert "training.batch_size (4)" in message
    assert "training.grad_accum_steps (2)" in message
    assert (CHECKPOINTING in message) == (saved == "false")
    assert message.endswith(str(run / "checkpoints" / "step-000002"))
    monkeypatch.undo()
    assert run_of(config, run, resume=True)[-1] == Saved(6, checkpoints(run)[-1])


def test_real_out_of_memory_step_is_reported(config_of, tmp_path):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, before[1]))
    try:
        config = config_of("training.batch_size=65536", "model.d_model=128")
        assert refusal(lambda: run_of(config, tmp_path / "run"), TrainingError).startswith("out of memory")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_unrelated_errors_are_not_treated_as_out_of_memory():
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_failing_compiler_is_named_and_the_run_resumes_without_it(config_of, tmp_path, monkeypatch):
    def compiled(model):
        def fail(graph, inputs):
            raise RuntimeError("no working C++ compiler")

        for block in model.blocks:
            block.forward = torch.compile(block.forward, backend=fail)

    monkeypatch.setattr("seqmix.training.trainer.compile_blocks", compiled)
    run = tmp_path / "run"
    message = refusal(lambda: run_of(config_of("training.compile=true"), run), TrainingError)
    for part in (
        "set training.compile to false",
        "no working C++ compiler",
        str(run / "config.yaml"),
        f"--resume {run}",
    ):
        assert part in message
    monkeypatch.undo()
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("compile: true", "compile: false"))
    assert run_of(read_config(run), run, resume=True)[-1] == Saved(6, checkpoints(run)[-1])


def test_run_resumes_after_a_full_disk_error(config_of, tmp_path):
    config, run = config_of(), tmp_path / "run"

    def fill() -> None:
        (run / "metrics.jsonl").rename(run / "saved")
        (run / "metrics.jsonl").symlink_to("/dev/full")

    message = failing(config, run, Evaluated, 4, fill)
    assert re.match(f"{run} .*No space left on device.*{run / 'checkpoints' / 'step-000004'}$", message)
    (run / "saved").replace(run / "metrics.jsonl")
    assert run_of(config, run, resume=True)[-1].step == 6


@pytest.mark.parametrize("name", ["metrics.jsonl", "sessions.jsonl"])
def test_unwritable_file_is_named(config_of, tmp_path, name):
    config, run = config_of(), tmp_path / "run"
    stopped(config, run, 1)
    (run / name).unlink()
    (run / name).mkdir()
    message = refusal(lambda: run_of(config, run, resume=True), TrainingError)
    assert message.startswith(str(run / name))
    assert "Is a directory" in message
