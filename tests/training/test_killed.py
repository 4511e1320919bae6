"""Killed at any moment, a run goes on and ends as if nothing had been: the same bits.

The training is the real command in processes of its own, which are forked from one that has imported torch, and killed
by SIGKILL, which no handler sees.
"""

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
import workers
from hypothesis import settings
from safetensors.torch import load_file

from seqmix.training.checkpoint import checkpoints, verify

if "forkserver" not in multiprocessing.get_all_start_methods():
    pytest.skip("needs processes that fork", allow_module_level=True)

STEPS = 40
PRESET = (
    "retnet-tiny",
    "model.d_model=16",
    "model.n_layers=2",
    "model.dropout=0.1",
    "data.sequence_length=16",
    f"training.steps={STEPS}",
    "training.warmup_steps=5",
    "training.batch_size=4",
    "training.carry_state=true",
    "training.evaluate_every=7",
    "training.evaluation_batches=2",
    "training.checkpoint_every=3",
    "training.log_every=1",
)
COMPILED = (*PRESET, "model.blocks.ret.ffn=null", "training.compile=true")
"""Without feed-forward networks, for fewer kernels to build."""


@pytest.fixture(scope="module")
def processes():
    """Processes that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    # torch imports its compiler when a model is built without memory
    context.set_forkserver_preload(["seqmix.cli", "seqmix.commands.progress", "torch._dynamo"])
    return context


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("what was read is kept, and what is kept is read again. " * 60)
    return file


@pytest.fixture(scope="module")
def undisturbed(processes, text, tmp_path_factory) -> Path:
    """The run that nothing happens to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert finished(processes, *arguments_of(run, text)) == 0
    return run


def start(processes, *arguments):
    process = processes.Process(target=workers.command, args=tuple(map(str, arguments)))
    process.start()
    return process


def finished(processes, *arguments) -> int:
    """Run the command to its end; its status."""
    process = start(processes, *arguments)
    process.join(600)
    return process.exitcode


def made(run: Path) -> int:
    """Steps that the run has measured."""
    file = run / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.exists() else 0


def arguments_of(run: Path, text: Path, preset: tuple[str, ...] = PRESET) -> tuple:
    """What begins the run, or goes on with it."""
    if (run / "config.yaml").exists():
        return "train", "--resume", run
    return "train", *preset, f"data.paths=[{text}]", "--out", run


def everything(run: Path) -> dict[str, bytes]:
    """Parameters, moments and state of the last checkpoint, to the bit."""
    folder = checkpoints(run)[-1]
    verify(folder)
    assert folder.name == f"step-{STEPS:06d}"
    tensors = {(f.name, name): x for f in folder.glob("*.safetensors") for name, x in load_file(f).items()}
    assert len({file for file, _ in tensors}) == 3
    return {f"{file}: {name}": tensor.numpy().tobytes() for (file, name), tensor in tensors.items()}


def losses(run: Path) -> list[tuple]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss"), line.get("validation_loss")) for line in lines]


def require_undisturbed(run: Path, undisturbed: Path) -> None:
    assert everything(run) == everything(undisturbed)
    assert losses(run) == losses(undisturbed)
    for folder in (run, undisturbed):
        assert not list((folder / "checkpoints").glob(".*")), "what was left half done is still there"
    assert [f.name for f in checkpoints(run)] == [f.name for f in checkpoints(undisturbed)]


def kill_again_and_again(processes, run: Path, text: Path, kills: int, preset: tuple[str, ...] = PRESET) -> None:
    """Kill a run in the middle as often, and let it end."""
    moments, killed = random.Random(kills), 0
    targets = sorted(moments.randrange(STEPS - 10) for _ in range(kills))
    for target in targets:
        process = start(processes, *arguments_of(run, text, preset))
        waited = time.monotonic() + 600
        while made(run) < target and process.is_alive():
            assert time.monotonic() < waited
            time.sleep(0.001)
        time.sleep(moments.random() * 0.02)
        process.kill()
        process.join(60)
        killed += process.exitcode == -signal.SIGKILL
    assert killed == kills
    assert finished(processes, "train", "--resume", run) == 0


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_again_and_again_is_the_undisturbed_one(processes, text, undisturbed, tmp_path, kills):
    kill_again_and_again(processes, tmp_path / "run", text, kills)
    require_undisturbed(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_compiled_run_killed_again_and_again_is_the_undisturbed_one(processes, text, tmp_path):
    """Twice; 20 times with --hypothesis-profile nightly: every start compiles, or reads what was compiled."""
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    assert finished(processes, *arguments_of(undisturbed, text, COMPILED)) == 0
    kill_again_and_again(processes, run, text, settings().max_examples // 50, COMPILED)
    require_undisturbed(run, undisturbed)


# a function, and the number of its call: a checkpoint's files, their way to the disk, its name, the end of an old one
MOMENTS = (
    ("save_file", 4),
    ("save_file", 9),
    ("flush", 8),
    ("flush", 12),
    ("Path.rename", 3),
    ("shutil.rmtree", 3),
    ("shutil.rmtree", 6),
)


def test_a_run_killed_in_its_checkpoints_is_the_undisturbed_one(processes, text, undisturbed, tmp_path):
    run = tmp_path / "run"
    for moment in MOMENTS:
        arguments = (*moment, *map(str, arguments_of(run, text)))
        process = processes.Process(target=workers.command_killed_in, args=arguments)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, moment
        assert made(run) < STEPS
    assert finished(processes, "train", "--resume", run) == 0
    require_undisturbed(run, undisturbed)
