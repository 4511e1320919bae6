"""Small runs: their events, their metrics and checkpoints to the bit, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from seqmix import RunConfig, SeqmixError, train
from seqmix.training.checkpoint import checkpoints

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


def refusal(action: Callable[[], object], kind: type[SeqmixError] = SeqmixError) -> str:
    """The one line with which an action is refused."""
    with pytest.raises(kind) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)
