"""Where conformance is checked (the CPU, and a GPU where there is one; `--device` chooses), the command, small runs."""

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from seqmix import RunConfig, load_config
from seqmix.cli.app import main
from seqmix.ops.recurrence import products
from seqmix.training.monitoring.memory import keep_freed_memory

# tensors are small here: threads would wait for each other, much of the time on a busy machine
torch.set_num_threads(1)
# dtypes are the same on every processor, whatever it multiplies fast
products.HAS_BFLOAT16 = False

# a busy machine is not a failure; the kit draws the same cases in every run only under the profile of this name
settings.register_profile("default", deadline=None)
settings.load_profile("default")
# ten times the cases: pytest -m conformance --hypothesis-profile nightly
settings.register_profile("nightly", max_examples=10 * settings().max_examples)


def pytest_addoption(parser):
    parser.addoption("--device", action="append", help="where conformance is checked; may be given several times")


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        found = metafunc.config.getoption("device") or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        metafunc.parametrize("device", found)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    # these compare with other libraries, which the README's install does not bring
    for item in items:
        if item.path.parent.name in ("peers", "hf"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _memory_is_kept():
    keep_freed_memory()  # a tenth of the suite's time; a run that ends gives it back


@pytest.fixture(autouse=True)
def _device_is_there(request):
    if "device" in request.fixturenames:
        device = request.getfixturevalue("device")
        if device.startswith("cuda") and not torch.cuda.is_available():
            pytest.fail(f"--device {device}, and torch finds no GPU", pytrace=False)


@dataclass(frozen=True)
class Done:
    """What a command did."""

    status: int
    out: str
    err: str


@pytest.fixture
def seqmix(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder with a text, on a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    Path("text.txt").write_text("the text of a small run, over and over again. " * 60)
    modules = set(sys.modules)

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["seqmix", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        capsys.readouterr()
        handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGINT, handler)
            sys.unraisablehook = hook
        out, err = capsys.readouterr()
        return Done(int(ended.value.code or 0), out, err)

    yield call
    # modules of the folder, which the next test's folder may have as well
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def refused(seqmix):
    """Run the command on bad input: the exit status and one line; returns the line without `error: `."""

    def call(*arguments: str, status: int = 2) -> str:
        done = seqmix(*arguments)
        assert done.status == status
        assert done.out == ""
        lines = done.err.splitlines()
        assert len(lines) == 1, done.err
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return call


SMALL = (
    "model.d_model=16",
    "model.n_layers=2",
    "data.sequence_length=16",
    "training.steps=6",
    "training.batch_size=4",
    "training.optimizer=adamw",
    "training.learning_rate=3.0e-3",
    "training.schedule=cosine",
    "training.warmup_steps=2",
    "training.evaluate_every=2",
    "training.evaluation_batches=2",
    "training.final_evaluation_batches=null",
    "training.checkpoint_every=2",
    "training.log_every=1",
)
"""A preset made so small that a run takes a fraction of a second."""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 3000 bytes."""
    words = np.array(["the", "mixer", "reads", "a", "token", "and", "writes", "its", "state"])
    chosen = words[np.random.default_rng(0).integers(len(words), size=1000)]
    file = tmp_path / "text.txt"
    file.write_text(" ".join(chosen)[:3000])
    return file


@pytest.fixture
def config_of(text: Path) -> Callable[..., RunConfig]:
    """A small run with changes, of a preset's blocks."""

    def make(*overrides: str, preset: str = "retnet-tiny") -> RunConfig:
        return load_config(preset, [*SMALL, f"data.paths=[{text}]", *overrides])

    return make
