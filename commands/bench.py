"""`seqmix bench`: what is to be measured, progress while it is, and where the figures go."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..benchmarks import learn
from ..benchmarks.benchmark import Report, Settings, run
from ..benchmarks.models import DecodeBenchmark, PrefillBenchmark, TrainBenchmark, model_to_measure
from ..benchmarks.op import OpBenchmark
from ..benchmarks.recurrences import RecurrenceBenchmark
from ..benchmarks.report import cells, conditions, markdown, name_columns, skipped, to_json
from ..experiments.benchmark_figures import figures_of
from ..experiments.figures.writer import COLUMN, draw, require_drawable
from ..registry import SeqmixError, require_name, write_file
from ..training.monitoring.memory import keep_freed_memory
from .console import plain_table, terminal
from .options import DTYPES, Device, JsonFile, Overrides, require_device, require_writable

KINDS = (OpBenchmark, RecurrenceBenchmark, TrainBenchmark, DecodeBenchmark, PrefillBenchmark)
BENCHMARKS = {kind.name: kind for kind in KINDS}
LENGTHS = {
    "op": (1024, 4096),
    "recurrence": (1024, 4096),
    "train": (512, 2048),
    "decode": (64, 1024, 8192),
    "prefill": (512, 2048),
}
"""What is measured where no length is given."""
LONGEST = 2**24
SPARED = ("parameters", "tokens/s", "from - to", "ratio from - to", "peak MiB")
"""Columns that a narrow terminal is spared, in this order."""


def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="op (a map over a sequence), recurrence (each op family beside a loop over tokens), train (a training "
            "step), decode (a token), prefill (a prompt), or learn (what small models reach on a text: "
            "data.paths=\\[text.txt]).",
            metavar="op|recurrence|train|decode|prefill|learn",
        ),
    ],
    config: Annotated[
        str | None,
        typer.Argument(
            help="A preset or a YAML file: the model; a RetNet of 20M parameters by default.", metavar="[CONFIG]"
        ),
    ] = None,
    overrides: Overrides = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            "--length",
            "--context",
            help="Tokens of a sequence; for decode, tokens read before. May be given several times.",
            metavar="TOKENS",
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16; train computes by autocast, with float32 parameters.")
    ] = "float32",
    repeat: Annotated[int, typer.Option(help="Rounds, in each of which all run once; at least 5.")] = 5,
    only: Annotated[list[str] | None, typer.Option(help="Measure this one; all by default.", metavar="NAME")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Add compiled variants of those that have one.")] = False,
    activation_checkpointing: Annotated[
        bool,
        typer.Option("--activation-checkpointing", help="train: recompute activations in backward, for less memory."),
    ] = False,
    tokens: Annotated[int, typer.Option(help="train: tokens of a step at most, in whole sequences.")] = 2048,
    batch: Annotated[int, typer.Option(help="op, recurrence, decode, prefill: sequences at once.")] = 1,
    limit: Annotated[float, typer.Option(help="Skip what would take longer a call, in seconds.")] = 120.0,
    interleave_lengths: Annotated[
        bool, typer.Option("--interleave-lengths", help="Let all lengths take turns; ratios are to the first length.")
    ] = False,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Measure the processor's time, which a busy machine stretches least.")
    ] = False,
    json_file: JsonFile = None,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table.", metavar="FILE")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw time and memory: .html, .svg, .png, .pdf.", metavar="FILE")
    ] = None,
) -> None:
    """Benchmark throughput, latency and peak memory against other installed implementations.

    All models have as many parameters, run warm, and take turns in one run. Ratios are to the first; shares are of
    what the machine can do at most, measured in the same rounds. What cannot run is shown with its reason.

    [bold]seqmix bench op --length 2048 --length 8192[/bold]

    [bold]seqmix bench train --length 512 --only seqmix --only llama[/bold]

    [bold]seqmix bench decode hybrid-tiny --context 1024 --json decode.json[/bold]
    """
    require_name("benchmark", what, [*BENCHMARKS, "learn"])
    require_name("number format", dtype, DTYPES)
    for each in length or []:
        _require_range("--length", each, 1, LONGEST)
    _require_range("--repeat", repeat, 5, 10_000)
    _require_range("--tokens", tokens, 1, LONGEST)
    _require_range("--batch", batch, 1, 2**20)
    _require_range("--limit", limit, 0, float("inf"))
    if plot_file is not None:
        require_drawable("--plot", plot_file)
    require_writable(json_file, markdown_file, plot_file)
    keep_freed_memory()  # as `seqmix train` does; training has it as each one's own program does
    changes = [*([config] if config and "=" in config else []), *(overrides or [])]
    if what == "learn":
        if config and config not in changes:
            raise SeqmixError(f"bench learn has models of its own and takes changes alone, and was given {config!r}")
        measure = partial(learn.run, changes, only or [])
    else:
        settings = Settings(
            lengths=tuple(dict.fromkeys(length or LENGTHS[what])),
            model=model_to_measure(config if config not in changes else None, changes),
            device=require_device(device),
            dtype=DTYPES[dtype],
            repeat=repeat,
            only=tuple(only or []),
            compile=compiled,
            activation_checkpointing=activation_checkpointing,
            tokens=tokens,
            batch=batch,
            limit=limit,
            interleave_lengths=interleave_lengths,
            cpu_time=cpu_time,
        )
        measure = partial(run, BENCHMARKS[what](settings))
    console = Console(stderr=True, markup=False)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    # seldom redrawn: it runs beside what is measured
    with Progress(
        *columns, console=console, transient=True, refresh_per_second=2, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", visible=False)
        report = measure(lambda text: bar.update(task, description=text, visible=True))
    # files first: a terminal that has gone away loses nothing
    if json_file is not None:
        write_file(to_json(report), json_file)
    if markdown_file is not None:
        write_file(markdown(report), markdown_file)
    if plot_file is not None and (figures := figures_of(report)):
        draw(figures, plot_file, width=2 * COLUMN, title=report.title, text=conditions(report))
    show(report, terminal())


def show(report: Report, console: Console) -> None:
    """Print the table, and what a reader must know."""
    endless = console.options.update_width(10_000)
    tables = [_table(report, SPARED[:spared]) for spared in range(len(SPARED) + 1)]
    fitting = (table for table in tables if Measurement.get(console, endless, table).maximum <= console.width)
    table = next(fitting, tables[-1])
    console.print(f"{report.title}. {conditions(report)}", soft_wrap=True)
    console.print(table)
    for line in (*skipped(report), *report.notes):
        console.print(line, soft_wrap=True)


def _table(report: Report, spared: tuple[str, ...]) -> Table:
    heads, lines = cells(report, spared)
    table = plain_table(*heads, rows=lines, justify="right", no_wrap=True)
    for column in table.columns[: name_columns(report)]:
        column.justify = "left"
    return table


def _require_range(option: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        limits = f"at least {low:,}" if high == float("inf") else f"from {low:,} to {high:,}"
        raise SeqmixError(f"{option} is {value:,}; allowed: {limits}")
