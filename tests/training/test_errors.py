"""What the machine refuses in the middle of a run is one sentence, and the run goes on from what is kept."""

import errno
import resource
from pathlib import Path

import pytest
import torch

from seqmix import SeqmixError, train
from seqmix.models import is_out_of_memory
from seqmix.training import TrainingError, read_config
from seqmix.training.checkpoint import checkpoints
from seqmix.training.events import Evaluated, Saved, Stepped
from seqmix.training.trainer import Trainer

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "8589934592 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8 GiB.")
NUMPY = MemoryError("Unable to allocate 8.00 TiB for an array with shape (1099511627776,) and data type float64")


def failing(config, run: Path, at: type, step: int, break_it) -> str:
    """Train until an event, break something, and go on: the sentence."""

    def train_and_break() -> None:
        for event in train(config, run):
            if isinstance(event, at) and event.step == step:
                break_it()

    with pytest.raises(SeqmixError) as raised:
        train_and_break()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def failure(error: Exception):
    """A step that fails."""

    def fail(self: Trainer, step: int) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (CPU, " (8.0 GiB more were asked for)"),
        (CUDA, " (2.50 GiB more were asked for)"),
        (NUMPY, " (8.00 TiB more were asked for)"),
        (MemoryError(), ""),
    ],
)
def test_a_lack_of_memory_names_what_takes_less_and_what_is_kept(config_of, tmp_path, monkeypatch, error, asked):
    config, run = config_of("training.grad_accum_steps=2"), tmp_path / "run"
    message = failing(config, run, Stepped, 3, lambda: monkeypatch.setattr(Trainer, "train_step", failure(error)))
    assert message == (
        f"memory ran out{asked}: lower training.batch_size (4), raise training.grad_accum_steps (2), for smaller "
        "micro-batches, or set training.activation_checkpointing to true; "
        f"the newest checkpoint is {run / 'checkpoints' / 'step-000002'}"
    )
    monkeypatch.undo()
    assert list(train(config, run, resume=True))[-1] == Saved(6, checkpoints(run)[-1])


def test_a_step_that_really_takes_too_much_memory_is_one_sentence(config_of, tmp_path):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, before[1]))
    try:
        with pytest.raises(TrainingError, match=r"^memory ran out .*; no checkpoint was written yet$"):
            list(train(config_of("training.batch_size=65536", "model.d_model=128"), tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_what_saves_memory_already_is_not_advised(config_of, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "train_step", failure(MemoryError()))
    with pytest.raises(TrainingError) as raised:
        list(train(config_of("training.activation_checkpointing=true"), tmp_path / "run"))
    assert "activation_checkpointing" not in str(raised.value)


def test_a_compiler_that_fails_is_one_sentence(config_of, tmp_path, monkeypatch):
    def compiled(model):
        def fail(graph, inputs):
            raise RuntimeError("no working C++ compiler")

        for block in model.blocks:
            block.forward = torch.compile(block.forward, backend=fail)

    monkeypatch.setattr("seqmix.training.trainer.compile_blocks", compiled)
    run = tmp_path / "run"
    sentence = r"^training\.compile: the compiler has failed \(.*no working C\+\+ compiler\): set it to false in "
    with pytest.raises(TrainingError, match=f"{sentence}{run / 'config.yaml'}, and go on with --resume {run}; "):
        list(train(config_of("training.compile=true"), run))
    monkeypatch.undo()
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("compile: true", "compile: false"))
    assert list(train(read_config(run), run, resume=True))[-1] == Saved(6, checkpoints(run)[-1])


def test_other_errors_of_the_machine_are_not_taken_for_a_lack_of_memory():
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_full_disk_is_one_sentence_and_the_run_goes_on(config_of, tmp_path):
    config, run = config_of(), tmp_path / "run"

    def fill() -> None:
        (run / "metrics.jsonl").rename(run / "kept")
        (run / "metrics.jsonl").symlink_to("/dev/full")

    message = failing(config, run, Evaluated, 4, fill)
    assert message == (
        f"{run} cannot be read or written: No space left on device; "
        f"the newest checkpoint is {run / 'checkpoints' / 'step-000004'}"
    )
    (run / "kept").replace(run / "metrics.jsonl")
    assert list(train(config, run, resume=True))[-1].step == 6


@pytest.mark.parametrize("name", ["metrics.jsonl", "sessions.jsonl"])
def test_a_file_that_cannot_be_written_is_named(config_of, tmp_path, name):
    config, run = config_of(), tmp_path / "run"
    list(train(config, run, stop=lambda: True))
    (run / name).unlink()
    (run / name).mkdir()
    with pytest.raises(TrainingError) as raised:
        list(train(config, run, resume=True))
    assert str(raised.value).startswith(
        f"{run / name} cannot be read or written: Is a directory; the newest checkpoint"
    )


def test_a_checkpoint_that_cannot_be_written_leaves_no_half_behind(config_of, tmp_path, monkeypatch):
    config, run = config_of(), tmp_path / "run"

    def flush(path: Path) -> None:
        if "step-000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("seqmix.training.checkpoint.flush", flush)
    with pytest.raises(SeqmixError) as raised:
        list(train(config, run))
    message = str(raised.value)
    assert message.startswith(f"the checkpoint {run / 'checkpoints' / 'step-000004'} could not be written: ")
    assert message.endswith("No space left on device")
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["step-000002"]
