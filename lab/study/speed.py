"""Speed of a study's entries: training steps at several lengths and decoding after several contexts, interleaved.

The measurements are those of lab/bench, with each entry's model as an implementation.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...models import ModelConfig
from ...registry import dump, write_file
from ...training.precision import precision_of
from ..bench.benchmark import Implementation, Row, Settings, run
from ..bench.models import DecodeBenchmark, ModelBenchmark, ModelImplementation, TrainBenchmark
from ..bench.peers.ours import Seqmix
from ..bench.peers.peer import Size
from .plan import Plan
from .results import DecodeSpeedRow, SpeedResult, TrainSpeedRow
from .study import Speed

SPEED_FILE = "speed.json"


class _EntryBenchmark(ModelBenchmark):
    """Benchmark whose implementations are the entries of a study."""

    models: Mapping[str, ModelConfig]

    def implementations(self) -> Iterator[Implementation]:
        for name, model in self.models.items():
            implementation = ModelImplementation(self, Seqmix, Size(model))
            implementation.name = name
            yield implementation


class _TrainSpeed(_EntryBenchmark, TrainBenchmark):
    """Benchmark of the entries' training steps."""


class _DecodeSpeed(_EntryBenchmark, DecodeBenchmark):
    """Benchmark of the entries' decoding."""


def measure(plan: Plan, folder: Path, on_note: Callable[[str], None]) -> SpeedResult | None:
    """Time all entries of a study, or read the times from its folder if nothing has changed since.

    Returns:
        The speeds; None if the study has no `speed`.

    Raises:
        KeyboardInterrupt: the measurement was stopped early; nothing is saved.
    """
    if (speed := plan.study.speed) is None:
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {entry.name: entry.config.model for entry in plan.entries}
    precision = precision_of(plan.entries[0].config.training, device)
    request = {
        "speed": speed.model_dump(mode="json"),
        "device": str(device),
        "threads": plan.study.threads,
        "precision": str(precision).removeprefix("torch."),
        "models": {name: dump(model) for name, model in models.items()},
    }
    file = folder / SPEED_FILE
    if (saved := _read(file, request)) is not None:
        return saved
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.study.threads)
    try:
        result = _measure(speed, models, device, precision, on_note)
    finally:
        torch.set_num_threads(threads)
    write_file(json.dumps({"asked": request, "found": result.model_dump(mode="json")}, indent=1), file)
    return result


def _read(file: Path, request: object) -> SpeedResult | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return SpeedResult.model_validate(values["found"]) if values["asked"] == request else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _measure(
    speed: Speed,
    models: Mapping[str, ModelConfig],
    device: torch.device,
    precision: torch.dtype,
    on_note: Callable[[str], None],
) -> SpeedResult:
    settings = partial(
        Settings,
        model=next(iter(models.values())),
        device=device,
        repeat=speed.repeat,
        cpu_time=speed.cpu_time,
        measures_rates=False,
    )

    def rows(benchmark: _EntryBenchmark) -> list[Row]:
        benchmark.models = models
        report = run(benchmark, on_note)
        if len(report.rows) < len(models) * len(set(benchmark.settings.lengths)):
            raise KeyboardInterrupt  # the rounds ended early
        return report.rows

    train = []
    decode = []
    if speed.train is not None:
        train = rows(_TrainSpeed(settings(lengths=speed.train.lengths, tokens=speed.train.tokens, dtype=precision)))
    if speed.decode is not None:
        decode = rows(_DecodeSpeed(settings(lengths=speed.decode.contexts, batch=speed.decode.batch)))
    return SpeedResult(
        repeat=speed.repeat,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        tokens=speed.train and speed.train.tokens,
        batch=speed.decode and speed.decode.batch,
        cpu_time=speed.cpu_time,
        train=tuple(
            TrainSpeedRow(
                length=row.length,
                tokens_per_second=row.tokens_per_second,
                tokens_per_second_range=row.seconds
                and ((row.tokens or 0) / row.seconds.high, (row.tokens or 0) / row.seconds.low),
                **_common_fields(row),
            )
            for row in train
        ),
        decode=tuple(
            DecodeSpeedRow(
                context=row.length,
                seconds=row.seconds and row.seconds.median,
                seconds_range=row.seconds and (row.seconds.low, row.seconds.high),
                state_bytes=row.state_bytes,
                **_common_fields(row),
            )
            for row in decode
        ),
    )


def _common_fields(row: Row) -> dict[str, Any]:
    return {"entry": row.name, "memory_bytes": row.peak_bytes, "skipped": row.skipped}
