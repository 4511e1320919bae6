"""`seqmix bench`: options of a benchmark, its progress, and its results as a table or files."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...lab.bench import learn
from ...lab.bench.benchmark import Report, Settings, run
from ...lab.bench.figures import figures_of
from ...lab.bench.mixers import MixersBenchmark, former_names
from ...lab.bench.models import DecodeBenchmark, PrefillBenchmark, TrainBenchmark, model_to_measure
from ...lab.bench.op import OpBenchmark
from ...lab.bench.recurrences import RecurrenceBenchmark
from ...lab.bench.report import cells, conditions, fields_of, markdown, name_columns, skipped
from ...lab.figures.writer import COLUMN, draw, require_drawable
from ...registry import SeqmixError, require_name, write_file
from ...training.monitoring.memory import keep_freed_memory
from ..console import note, plain_table, terminal
from ..options import DTYPES, Device, Overrides, require_device, require_writable, seconds_of

KINDS = (OpBenchmark, RecurrenceBenchmark, MixersBenchmark, TrainBenchmark, DecodeBenchmark, PrefillBenchmark)
BENCHMARKS = {kind.name: kind for kind in KINDS}
LENGTHS = {
    "op": (1024, 4096),
    "recurrence": (1024, 4096),
    "mixers": (256, 2048),
    "train": (512, 2048),
    "decode": (64, 1024, 8192),
    "prefill": (512, 2048),
}
"""Default sequence lengths in tokens, by benchmark."""
MAX_TOKENS = 2**24
"""Upper limit of --length and --tokens."""
OPTIONAL_COLUMNS = ("parameters", "tokens/s", "from - to", "ratio from - to", "peak MiB")
"""Columns that are left out on a narrow terminal, in this order."""


def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="Benchmark: op (one sequence op), recurrence (each op family against a loop over tokens), mixers (a "
            "training step of every mixer's tiny preset), train (a training step), decode (one token), prefill (a "
            "prompt), or learn (the loss that small models reach on a text: data.paths=\\[text.txt]).",
            metavar="op|recurrence|mixers|train|decode|prefill|learn",
        ),
    ],
    config: Annotated[
        str | None,
        typer.Argument(
            help="Preset or YAML file of the model; by default a RetNet of 20M parameters.", metavar="[CONFIG]"
        ),
    ] = None,
    overrides: Overrides = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            "--length",
            "--context",
            help="Sequence length in tokens; for decode, length of the context. May be repeated.",
            metavar="TOKENS",
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Dtype: float32 or bfloat16; for train, bfloat16 is autocast with float32 parameters.")
    ] = "float32",
    repeat: Annotated[
        int, typer.Option(help="Number of rounds, at least 5; each implementation runs once per round.")
    ] = 5,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure only this implementation; may be repeated. All by default. Of mixers, a kind or the path of "
            "your own configuration, my_module:MyConfig.",
            metavar="NAME",
        ),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Also measure compiled variants of implementations that have one.")
    ] = False,
    activation_checkpointing: Annotated[
        bool,
        typer.Option(
            "--activation-checkpointing",
            help="For train and mixers: recompute activations in the backward pass, to save memory.",
        ),
    ] = False,
    tokens: Annotated[
        int, typer.Option(help="For train and mixers: maximum tokens per step, in whole sequences.")
    ] = 2048,
    batch: Annotated[int, typer.Option(help="For op, recurrence, decode and prefill: batch size.")] = 1,
    limit: Annotated[
        str,
        typer.Option(
            help="Skip an implementation if one call would take longer than this: 2m, or a number of seconds.",
            metavar="TIME",
        ),
    ] = "2m",
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time budget: 10m, or a number of seconds. At its end the rounds end, after 5 at least, and further "
            "lengths are skipped.",
            metavar="TIME",
        ),
    ] = None,
    interleave_lengths: Annotated[
        bool,
        typer.Option("--interleave-lengths", help="Interleave the lengths too; ratios are then to the first length."),
    ] = False,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Measure CPU time, which other programs affect least.")
    ] = False,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table as Markdown.", metavar="FILE")
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="Plot time and memory to a .html, .svg, .png or .pdf file.", metavar="FILE"),
    ] = None,
) -> Annotated[dict[str, Any], Report]:
    """Benchmark throughput, latency and peak memory against other installed implementations.

    All models have the same number of parameters. After a warm-up, their calls are interleaved in one run. Ratios are
    relative to the first implementation; the column `share` is the fraction of the machine's peak rate, measured in the
    same rounds. An implementation that cannot run is listed with the reason.

    [bold]seqmix bench op --length 2048 --length 8192[/bold]

    [bold]seqmix bench train --length 512 --only seqmix --only llama[/bold]

    [bold]seqmix bench decode hybrid-tiny --context 1024 --json decode.json[/bold]
    """
    require_name("benchmark", what, [*BENCHMARKS, "learn"])
    require_name("dtype", dtype, DTYPES)
    for each in length or []:
        _require_range("--length", each, 1, MAX_TOKENS)
    _require_range("--repeat", repeat, 5, 10_000)
    _require_range("--tokens", tokens, 1, MAX_TOKENS)
    _require_range("--batch", batch, 1, 2**20)
    seconds = None if budget is None else seconds_of("--budget", budget)
    if plot_file is not None:
        require_drawable("--plot", plot_file)
    require_writable(markdown_file, plot_file)
    keep_freed_memory()  # as `seqmix train` does
    changes = [*([config] if config and "=" in config else []), *(overrides or [])]
    if what == "mixers" and changes + [config] * (config is not None) != []:
        raise SeqmixError("bench mixers measures the tiny presets: leave out the configuration and KEY=VALUE changes")
    if what == "learn":
        if budget is not None:
            raise SeqmixError("bench learn makes a fixed number of steps: leave out --budget, or set training.steps")
        if config and config not in changes:
            raise SeqmixError(f"bench learn has its own models: expected only KEY=VALUE changes, got {config!r}")
        measure = partial(learn.run, changes, only or [])
    else:
        settings = Settings(
            lengths=tuple(dict.fromkeys(length or LENGTHS[what])),
            model=model_to_measure(config if config not in changes else None, changes),
            device=require_device(device),
            dtype=DTYPES[dtype],
            repeat=repeat,
            only=tuple(_kinds(only or []) if what == "mixers" else only or []),
            compile=compiled,
            activation_checkpointing=activation_checkpointing,
            tokens=tokens,
            batch=batch,
            limit=seconds_of("--limit", limit),
            budget=seconds,
            interleave_lengths=interleave_lengths,
            cpu_time=cpu_time,
        )
        measure = partial(run, BENCHMARKS[what](settings))
    console = Console(stderr=True, markup=False)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    # redrawn seldom, as drawing competes with the measurement
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", visible=False)
        report = measure(lambda text: bar.update(task, description=text, visible=True))
    # files first, in case the terminal is gone
    if markdown_file is not None:
        write_file(markdown(report), markdown_file)
    if plot_file is not None and (figures := figures_of(report)):
        draw(figures, plot_file, width=2 * COLUMN, title=report.title, text=conditions(report))
    show(report, terminal())
    return fields_of(report)


def show(report: Report, console: Console) -> None:
    """Print the title and conditions, the table, and notes. On a narrow terminal, some columns are left out."""
    unlimited = console.options.update_width(10_000)
    tables = [_table(report, OPTIONAL_COLUMNS[:number]) for number in range(len(OPTIONAL_COLUMNS) + 1)]
    fitting = (table for table in tables if Measurement.get(console, unlimited, table).maximum <= console.width)
    table = next(fitting, tables[-1])
    console.print(f"{report.title}. {conditions(report)}", soft_wrap=True)
    console.print(table)
    for line in (*skipped(report), *report.notes):
        console.print(line, soft_wrap=True)


def _table(report: Report, left_out: tuple[str, ...]) -> Table:
    headers, rows = cells(report, left_out)
    table = plain_table(*headers, rows=rows, justify="right", no_wrap=True)
    for column in table.columns[: name_columns(report)]:
        column.justify = "left"
    return table


def _require_range(option: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        limits = f"at least {low:,}" if high == float("inf") else f"from {low:,} to {high:,}"
        raise SeqmixError(f"expected {option} {limits}, got {value:,}")


def _kinds(names: Sequence[str]) -> list[str]:
    """Return the names of `bench mixers` with kinds in place of names of presets, which are deprecated."""
    former = former_names()
    for name in names:
        if name in former:
            note(f"--only {name} is deprecated, use {former[name]}: the next minor version removes the old name")
    return [former.get(name, name) for name in names]
