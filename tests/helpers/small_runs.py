"""Small runs: their events, their metrics and checkpoints to the bit, and what is refused."""

import json
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seqmix import RunConfig, SeqmixError, build_model, train
from seqmix.training.checkpoint.files import checkpoints
from seqmix.training.trainer import Trainer

DROPOUT = ("model.dropout=0.1", "model.blocks.ret.dropout=0.1")


def run_of(config: RunConfig, run: Path, **options) -> list:
    """All events of a run."""
    return list(train(config, run, **options))


def stopped(config: RunConfig, run: Path, step: int, kind: type = object, **options) -> list:
    """All events of a run that is asked to stop with an event of this kind and step."""
    events: list = []
    asked = lambda: any(isinstance(event, kind) and event.step == step for event in events)  # noqa: E731
    for event in train(config, run, stop=asked, **options):
        events.append(event)
    return events


def losses(events: list) -> list[float]:
    """The loss of every step and evaluation."""
    return [event.loss for event in events if hasattr(event, "loss")]


def metrics(run: Path) -> list[dict]:
    """The lines of a run, without what depends on the clock."""
    measured = {"tokens_per_second", "mfu", "memory_bytes"}
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in measured} for line in lines]


def steps_of(run: Path) -> int:
    """Steps that a run has measured."""
    file = run / "metrics.jsonl"
    return file.read_text().count('"loss"') if file.exists() else 0


def wait_for_steps(run: Path, steps: int, alive: Callable[[], bool]) -> None:
    """Wait until a run in another process has measured as many steps, or is not alive."""
    waited = time.monotonic() + 300
    while steps_of(run) < steps and alive():
        assert time.monotonic() < waited, f"{steps_of(run)} of {steps} steps within five minutes"
        time.sleep(0.001)


def trainer_of(config: RunConfig) -> Trainer:
    """A trainer by plain gradient descent: a difference of the gradients shows in proportion."""
    model = build_model(config.model, seed=config.seed)
    return Trainer(config, config.open_data(), model, torch.optim.SGD(model.parameters()))


def checkpoint_bytes(run: Path) -> dict[str, bytes]:
    """Step, parameters, moments and state of the newest checkpoint, to the bit."""
    folder = checkpoints(run)[-1]
    tensors = {(file.name, name): x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}
    return {"folder": folder.name.encode()} | {f"{f}: {name}": x.numpy().tobytes() for (f, name), x in tensors.items()}


def require_same_run(run: Path, other: Path) -> None:
    """The same metrics, and the same last checkpoint to the bit."""
    assert metrics(run) == metrics(other)
    assert checkpoint_bytes(run) == checkpoint_bytes(other)


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Inside, no file may have more bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def refusal(action: Callable[[], object], kind: type[SeqmixError] = SeqmixError) -> str:
    """The one line with which an action is refused."""
    with pytest.raises(kind) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)
