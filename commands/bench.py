"""The `bench` command: what is to be measured, progress while it is, and where the figures go."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..benchmarks.decode import DecodeBenchmark
from ..benchmarks.op import OpBenchmark
from ..benchmarks.prefill import PrefillBenchmark
from ..benchmarks.report import markdown, plot, require_plot, show, to_json
from ..benchmarks.suite import Benchmark, Settings, run
from ..benchmarks.train import TrainBenchmark
from ..models import ModelConfig
from ..registry import SeqmixError, nearest
from ..training import load_config
from ..training.memory import keep_freed_memory
from .console import terminal

BENCHMARKS: dict[str, type[Benchmark]] = {
    kind.name: kind for kind in (OpBenchmark, TrainBenchmark, DecodeBenchmark, PrefillBenchmark)
}
LENGTHS = {"op": (1024, 4096), "train": (512, 2048), "decode": (64, 1024, 8192), "prefill": (512, 2048)}
"""What is measured where no length is given."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LONGEST = 2**24
MODEL = (
    "model.d_model=512",
    "model.n_layers=6",
    "model.blocks.ret.mixer={n_heads: 4, chunk_size: 128}",
)
"""The model where no configuration is given, about 20M parameters: how it differs from retnet-tiny."""


def bench_command(
    what: str,
    config: str | None,
    changes: Sequence[str],
    *,
    lengths: Sequence[int],
    device: str,
    dtype: str,
    repeat: int,
    only: Sequence[str],
    compiled: bool,
    checkpoint: bool,
    tokens: int,
    batch: int,
    limit: float,
    json_file: Path | None,
    markdown_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Measure, print a table, and write files.

    Raises:
        SeqmixError: there is no such benchmark, contestant, device or number format, a number is out of range, or a
            file cannot be written; all of it before anything is measured.
    """
    _require_name("benchmark", what, BENCHMARKS)
    _require_name("number format", dtype, DTYPES)
    for length in lengths:
        _require_range("--length", length, 1, LONGEST)
    _require_range("--repeat", repeat, 5, 10_000)
    _require_range("--tokens", tokens, 1, LONGEST)
    _require_range("--batch", batch, 1, 2**20)
    _require_range("--limit", limit, 0, float("inf"))
    _require_device(device)
    if plot_file is not None:
        require_plot(plot_file)
    for file in (json_file, markdown_file, plot_file):
        if file is not None:
            _require_writable(file)
    benchmark = BENCHMARKS[what](
        Settings(
            lengths=tuple(dict.fromkeys(lengths)) or LENGTHS[what],
            model=model_to_measure(config, changes),
            device=torch.device(device),
            dtype=DTYPES[dtype],
            repeat=repeat,
            only=tuple(only),
            compile=compiled,
            checkpoint=checkpoint,
            tokens=tokens,
            batch=batch,
            limit=limit,
        )
    )
    keep_freed_memory()  # as `seqmix train` does; training has it as each one's own program does
    with _progress() as told:
        report = run(benchmark, told)
    # files first: a terminal that has gone away loses nothing
    if json_file is not None:
        json_file.write_text(to_json(report), encoding="utf-8")
    if markdown_file is not None:
        markdown_file.write_text(markdown(report), encoding="utf-8")
    if plot_file is not None:
        plot(report, plot_file)
    show(report, terminal())


def model_to_measure(config: str | None, changes: Sequence[str]) -> ModelConfig:
    """A configuration's model, without dropout, which the others have not; the default one and changes where none."""
    if config is None or "=" in config:  # changes alone
        model = load_config("retnet-tiny", [*MODEL, *([config] if config else []), *changes]).model
    else:
        model = load_config(config, changes).model
    blocks = {name: block.model_copy(update={"dropout": 0.0}) for name, block in model.blocks.items()}
    return model.model_copy(update={"dropout": 0.0, "blocks": blocks})


def _require_name(kind: str, name: str, allowed: Collection[str]) -> None:
    if name not in allowed:
        raise SeqmixError(f"there is no {kind} {name!r}; allowed: {', '.join(allowed)}{nearest(name, allowed)}")


def _require_range(option: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        limits = f"at least {low:,}" if high == float("inf") else f"from {low:,} to {high:,}"
        raise SeqmixError(f"{option} is {value:,}; allowed: {limits}")


def _require_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SeqmixError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None


def _require_writable(file: Path) -> None:
    folder = file.absolute().parent
    if not folder.is_dir():
        raise SeqmixError(f"{file} cannot be written: there is no folder {folder}")
    if file.is_dir():
        raise SeqmixError(f"{file} cannot be written: it is a folder")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise SeqmixError(f"{file} cannot be written: permission denied")


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """What is being done, on the terminal, from the first word on: bad input shows nothing but its error."""
    # seldom drawn anew: it runs beside what is measured
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=Console(stderr=True, markup=False),
        transient=True,
        refresh_per_second=2,
    )
    task = bar.add_task("")

    def told(text: str) -> None:
        bar.update(task, description=text)
        if not bar.live.is_started and bar.console.is_terminal:
            bar.start()

    try:
        yield told
    finally:
        if bar.live.is_started:
            bar.stop()
