"""Speed of a study's entries: steps of training over the length, tokens of decoding over the context, interleaved.

The benchmarks' own implementations, rounds and figures, with an entry's model in each.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..benchmarks.benchmark import Implementation, Row, Settings, run
from ..benchmarks.models import DecodeBenchmark, ModelBenchmark, ModelImplementation, TrainBenchmark
from ..benchmarks.peers.ours import Seqmix
from ..benchmarks.peers.peer import Size
from ..models import ModelConfig
from ..registry import dump, write_file
from .plan import Plan
from .results import DecodeSpeedRow, SpeedResult, TrainSpeedRow
from .study import Speed

SPEED_FILE = "speed.json"


class _OfEntries(ModelBenchmark):
    """A benchmark whose implementations are a study's entries."""

    models: Mapping[str, ModelConfig]

    def implementations(self) -> Iterator[Implementation]:
        for name, model in self.models.items():
            implementation = ModelImplementation(self, Seqmix, Size(model))
            implementation.name = name
            yield implementation


class _TrainSpeed(_OfEntries, TrainBenchmark):
    """Steps of training."""


class _DecodeSpeed(_OfEntries, DecodeBenchmark):
    """Tokens of decoding."""


def measure(plan: Plan, folder: Path, tell: Callable[[str], None]) -> SpeedResult | None:
    """Time all entries, unless the folder has what was timed of the same ones; None where the study asks for nothing.

    Raises:
        KeyboardInterrupt: it was stopped before the end; nothing is saved.
    """
    if (speed := plan.study.speed) is None:
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {entry.name: entry.config.model for entry in plan.entries}
    asked = {
        "speed": speed.model_dump(mode="json"),
        "device": str(device),
        "threads": plan.study.threads,
        "models": {name: dump(model) for name, model in models.items()},
    }
    file = folder / SPEED_FILE
    if (found := _read(file, asked)) is not None:
        return found
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.study.threads)
    try:
        found = _measured(speed, models, device, tell)
    finally:
        torch.set_num_threads(threads)
    write_file(json.dumps({"asked": asked, "found": found.model_dump(mode="json")}, indent=1), file)
    return found


def _read(file: Path, asked: object) -> SpeedResult | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return SpeedResult.model_validate(values["found"]) if values["asked"] == asked else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _measured(
    speed: Speed, models: Mapping[str, ModelConfig], device: torch.device, tell: Callable[[str], None]
) -> SpeedResult:
    settings = partial(Settings, model=next(iter(models.values())), device=device, repeat=speed.repeat, shares=False)

    def rows(benchmark: _OfEntries) -> list[Row]:
        benchmark.models = models
        report = run(benchmark, tell)
        if len(report.rows) < len(models) * len(set(benchmark.settings.lengths)):
            raise KeyboardInterrupt  # the rounds ended early
        return report.rows

    train = []
    decode = []
    if speed.train is not None:
        train = rows(_TrainSpeed(settings(lengths=speed.train.lengths, tokens=speed.train.tokens)))
    if speed.decode is not None:
        decode = rows(_DecodeSpeed(settings(lengths=speed.decode.contexts, batch=speed.decode.batch)))
    return SpeedResult(
        repeat=speed.repeat,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        tokens=speed.train and speed.train.tokens,
        batch=speed.decode and speed.decode.batch,
        train=tuple(
            TrainSpeedRow(
                length=row.length,
                tokens_per_second=row.tokens_per_second,
                tokens_per_second_range=row.seconds
                and ((row.tokens or 0) / row.seconds.high, (row.tokens or 0) / row.seconds.low),
                **_shared(row),
            )
            for row in train
        ),
        decode=tuple(
            DecodeSpeedRow(
                context=row.length,
                seconds=row.seconds and row.seconds.median,
                seconds_range=row.seconds and (row.seconds.low, row.seconds.high),
                state_bytes=row.state_bytes,
                **_shared(row),
            )
            for row in decode
        ),
    )


def _shared(row: Row) -> dict[str, Any]:
    return {"entry": row.name, "memory_bytes": row.peak_bytes, "skipped": row.skipped}
