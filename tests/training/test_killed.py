"""A run killed at any moment resumes and ends bitwise identical to an uninterrupted one.

Each run is the real command in a separate process, killed by SIGKILL, which no handler can catch.
"""

import random
import signal
import time
from pathlib import Path

import pytest
import worker_processes
from nightly import NIGHTLY
from small_runs import checkpoint_bytes, require_same_run, steps_of, wait_for_steps

from seqmix.training.checkpoint.files import checkpoints, verify

pytestmark = pytest.mark.slow

STEPS = 40
PRESET = (
    *("retnet-tiny", "model.d_model=16", "model.n_layers=2", "model.dropout=0.1", "data.sequence_length=16"),
    *(f"training.steps={STEPS}", "training.warmup_steps=5", "training.batch_size=4", "training.carry_state=true"),
    *("training.evaluate_every=7", "training.evaluation_batches=2", "training.checkpoint_every=3"),
    "training.log_every=1",
)
# without feed-forward networks, for fewer kernels to build
COMPILED = (*PRESET, "model.blocks.ret.ffn=null", "training.compile=true")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("what was read is saved, and what is saved is read again. " * 60)
    return file


@pytest.fixture(scope="module")
def start(processes, text):
    """Start or resume a run; with a target of `workers` and its arguments, by that."""

    def call(run: Path, *before, preset=PRESET, target=worker_processes.command):
        resumed = (run / "config.yaml").exists()
        arguments = ("--resume", run) if resumed else (*preset, f"data.paths=[{text}]", "--out", run)
        process = processes.Process(target=target, args=(*before, "train", *map(str, arguments)))
        process.start()
        return process

    return call


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """The run that nothing happens to."""
    made = {}

    def call(preset) -> Path:
        if preset not in made:
            made[preset] = tmp_path_factory.mktemp("uninterrupted") / "run"
            finish(start(made[preset], preset=preset))
        return made[preset]

    return call


def finish(process) -> None:
    process.join(600)
    assert process.exitcode == 0


def require_uninterrupted(run: Path, other: Path) -> None:
    require_same_run(run, other)
    for folder in (run, other):
        assert not list((folder / "checkpoints").glob(".*")), "a half written checkpoint is still there"
        assert checkpoints(folder)[-1].name == f"step-{STEPS:06d}"
        verify(checkpoints(folder)[-1])
    assert len({name.split(": ")[0] for name in checkpoint_bytes(run)}) == 1 + 3
    assert [f.name for f in checkpoints(run)] == [f.name for f in checkpoints(other)]


@pytest.mark.parametrize(
    ("kills", "preset"),
    [
        pytest.param(5, PRESET, id="5"),
        pytest.param(100, PRESET, id="100", marks=[pytest.mark.slow, NIGHTLY]),
        # every start compiles, or reads what was compiled
        pytest.param(20, COMPILED, id="compiled", marks=[pytest.mark.slow, NIGHTLY]),
    ],
)
def test_repeatedly_killed_run_matches_the_uninterrupted_one(start, uninterrupted, tmp_path, kills, preset):
    run, moments = tmp_path / "run", random.Random(kills)
    for target in sorted(moments.randrange(STEPS - 10) for _ in range(kills)):
        process = start(run, preset=preset)
        wait_for_steps(run, target, process.is_alive)
        time.sleep(moments.random() * 0.02)
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    finish(start(run))
    require_uninterrupted(run, uninterrupted(preset))


# a function, and the number of its call: a checkpoint's files, their way to the disk, its name, the end of an old one
MOMENTS = (
    *(("save_file", 4), ("save_file", 9), ("flush", 8), ("flush", 12)),
    *(("Path.rename", 3), ("shutil.rmtree", 3), ("shutil.rmtree", 6)),
)


def test_run_killed_while_checkpointing_matches_the_uninterrupted_one(start, uninterrupted, tmp_path):
    run = tmp_path / "run"
    for moment in MOMENTS:
        process = start(run, *moment, target=worker_processes.command_killed_in)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, moment
        assert steps_of(run) < STEPS
    finish(start(run))
    require_uninterrupted(run, uninterrupted(PRESET))
