"""Every mixer at the same small budget: each tiny preset of one kind of block is trained with each seed.

    python -m seqmix.benchmarks.families --out DIR [--seed 0 --seed 1] [--jobs 2] [PRESET ...]

Each run is a process of its own with one thread, `jobs` of them at once; of equal seeds all see the same batches in the
same order. Times are CPU time, which neighbours on a busy machine stretch least. A finished run leaves
DIR/PRESET-seedN.json and is not made again while its configuration stays what it is; one that was killed starts anew,
and one that fails is reported. DIR/results.json has all that is there, and docs/mixers.md a table of it.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Annotated

import numpy as np
import torch
import typer

from ..mixers.state import nbytes
from ..models import LanguageModel
from ..models.decoding import Decoder
from ..models.generate import prefill
from ..registry import SeqmixError, dump, nearest
from ..training import PRESETS, RunConfig, load_config, load_run, read_corpus, train
from ..training.loop import Evaluated, Stepped

PAGE = Path(__file__).resolve().parents[1] / "docs" / "mixers.md"
"""The page with the table; there is none where the package is installed without its repository."""
CONTEXT, DECODED = 256, 200
"""Tokens read before decoding is timed, and tokens decoded."""
PROGRAM = (
    sys.executable,
    "-c",
    "import sys; from seqmix.benchmarks.families import run_one; run_one(*sys.argv[1:])",
)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run measured."""

    preset: str
    seed: int
    mixer: str
    """The mixer's kind."""
    parameters: int
    loss: float
    """Nats a byte of the validation text at the end, as much of it as the preset takes."""
    tokens_per_second: float
    """Of training: the median of the steps, by the clock."""
    tokens_per_cpu_second: float
    """The same by CPU time."""
    cpu_seconds: float
    """Of all training steps."""
    state_bytes: int
    """Of one sequence's state, all layers, after `CONTEXT` tokens."""
    decode_seconds: float
    """Of one token of one sequence behind `CONTEXT` others, CPU time: the median of many."""
    config: str
    """The run's configuration, in YAML."""


@dataclass(frozen=True)
class Run:
    """A preset and a seed."""

    preset: str
    seed: int
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.preset}-seed{self.seed}"

    @property
    def config(self) -> RunConfig:
        """What is trained."""
        return load_config(self.preset, [*self.changes, f"seed={self.seed}"])

    def result(self, out: Path) -> Result | None:
        """What it measured, if it is finished and was the same run."""
        try:
            found = Result(**json.loads((out / f"{self.name}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return found if found.config == dump(self.config) else None


def single_kind_presets() -> dict[str, RunConfig]:
    """The tiny presets that learn a text and whose layers are all of one kind, by name."""
    presets = {file.stem: load_config(file.stem) for file in sorted(PRESETS.glob("*-tiny.yaml"))}
    texts = {name: config for name, config in presets.items() if config.data.kind == "text"}
    return {name: config for name, config in texts.items() if len(set(config.model.layers)) == 1}


def mixer_kind(config: RunConfig) -> str:
    """The kind of the mixer of all layers."""
    return config.model.blocks[config.model.layers[0]].mixer.kind


# ---- one run, in a process of its own


def run_one(preset: str, seed: str, out: str, *changes: str) -> None:
    """Train and measure, and write the result when it is there."""
    torch.set_num_threads(1)
    run, folder = Run(preset, int(seed), changes), Path(out)
    partial = folder / f"{run.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    result = measure(run, partial)
    file = partial / "result.json"
    file.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    file.replace(folder / f"{run.name}.json")
    shutil.rmtree(partial)


def measure(run: Run, folder: Path) -> Result:
    """Train in the folder, and decode with what was trained."""
    config, seconds, rates, loss = run.config, [], [], float("nan")
    began = time.process_time()
    for event in train(config, folder):
        spent = time.process_time() - began
        if isinstance(event, Stepped):
            seconds.append(spent)
            rates.append(event.tokens_per_second)
        elif isinstance(event, Evaluated):
            loss = event.loss
            print(f"step {event.step} of {config.training.steps}: {loss:.4f} nats a byte")
        began = time.process_time()
    model = load_run(folder)
    prompt = torch.from_numpy(np.resize(read_corpus(config.data).validation, CONTEXT).astype(np.int64))
    return Result(
        preset=run.preset,
        seed=run.seed,
        mixer=mixer_kind(config),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        loss=loss,
        tokens_per_second=median(rates),
        tokens_per_cpu_second=config.training.batch_size * config.data.sequence_length / median(seconds),
        cpu_seconds=sum(seconds),
        state_bytes=nbytes(model.init_state(1, max_length=CONTEXT)),
        decode_seconds=decode_seconds(model, prompt),
        config=dump(config),
    )


def decode_seconds(model: LanguageModel, prompt: torch.Tensor) -> float:
    """CPU seconds of a token behind a prompt, the median of many."""
    logits, state = prefill(model, [prompt], max_length=len(prompt) + DECODED)
    decoder, seconds = Decoder(model, state), []
    for _ in range(DECODED):
        token, began = logits.argmax(-1), time.process_time()
        logits = decoder.step(token)
        seconds.append(time.process_time() - began)
    return median(seconds)


# ---- all runs


def run_process(run: Run, out: Path, told: Callable[[str], None]) -> str | None:
    """Start one run and wait for it; what went wrong."""
    command = [*PROGRAM, run.preset, str(run.seed), str(out), *run.changes]
    last = "it printed nothing"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | ONE_THREAD
    ) as process:
        for line in process.stdout or ():
            if line := line.strip():
                last = line
                told(f"{run.name}: {line}")
    if process.returncode == 0:
        return None
    code = process.returncode
    return f"{f'killed by signal {-code}' if code < 0 else f'exit status {code}'}: {last}"


def run_all(runs: Iterable[Run], out: Path, jobs: int, told: Callable[[str], None]) -> dict[str, str]:
    """Make the runs that are not finished, `jobs` at once; what went wrong, by run."""
    left = [run for run in runs if run.result(out) is None]
    with ThreadPoolExecutor(jobs) as pool:
        problems = pool.map(lambda run: run_process(run, out, told), left)
        return {run.name: problem for run, problem in zip(left, problems, strict=True) if problem is not None}


# ---- the table


def table(results: Sequence[Result]) -> list[str]:
    """A row a preset; losses by seed."""
    seeds = sorted({result.seed for result in results})
    presets = list(dict.fromkeys(result.preset for result in results))
    losses = [f"loss, seed {seed}" for seed in seeds] + (["mean"] if len(seeds) > 1 else [])
    heads = ["mixer", "preset", "parameters", *losses, "tokens/s", "state, bytes", "ms a decoded token"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    retention = _speed([result for result in results if result.mixer == "retention"])
    for preset in presets:
        own = {result.seed: result for result in results if result.preset == preset}
        first, speed = next(iter(own.values())), _speed(own.values())
        cells = [f"{own[seed].loss:.4f}" if seed in own else "" for seed in seeds]
        if len(seeds) > 1:
            cells.append(f"{mean(result.loss for result in own.values()):.4f}" if len(own) == len(seeds) else "")
        ratio = f" ({speed / retention:.2f})" if retention else ""
        decode = median(result.decode_seconds for result in own.values())
        cells += [f"{speed:,.0f}{ratio}", f"{first.state_bytes:,}", f"{1e3 * decode:.2f}"]
        lines.append(f"| `{first.mixer}` | `{preset}` | {first.parameters:,} | {' | '.join(cells)} |")
    return lines


def _speed(results: Iterable[Result]) -> float:
    """Tokens a CPU second; 0 of no run."""
    speeds = [result.tokens_per_cpu_second for result in results]
    return median(speeds) if speeds else 0.0


def fill(page: str, name: str, lines: Sequence[str]) -> str:
    """A page with other lines between `<!-- name: begin -->` and `<!-- name: end -->`.

    Raises:
        SeqmixError: the page has no such region.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found and found_end):
        raise SeqmixError(f"the page has no region between {begin} and {end}")
    return "\n".join([before + begin, "", *lines, "", end]) + after


def main(
    out: Annotated[Path, typer.Option(help="The folder that results are written to.")],
    presets: Annotated[list[str] | None, typer.Argument(help="Presets to train; all by default.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds; 0 and 1 by default.", show_default=False)] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each on one core.")] = 2,
    change: Annotated[
        list[str] | None, typer.Option(help="A change of every preset: dotted.path=value.", show_default=False)
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="The page with the table; docs/mixers.md where nothing is changed.", show_default=False),
    ] = None,
) -> None:
    """Train every mixer at the same small budget."""
    known, seeds, changes = list(single_kind_presets()), seed or [0, 1], tuple(change or ())
    for name in presets or ():
        if name not in known:
            raise SeqmixError(
                f"there is no preset {name!r} of one mixer; presets: {', '.join(known)}{nearest(name, known)}"
            )
    if page is None and not changes and PAGE.exists():
        page = PAGE
    try:
        out.mkdir(parents=True, exist_ok=True)
        if page is not None:  # that is known before hours of training
            fill(page.read_text(encoding="utf-8"), "trained", [])
    except OSError as error:
        raise SeqmixError(f"{error.filename} cannot be used: {error.strerror}") from None
    runs = [Run(preset, number, changes) for preset in known for number in seeds]
    problems = run_all([run for run in runs if run.preset in (presets or known)], out, jobs, typer.echo)
    # those of earlier calls too
    results = [result for run in runs if (result := run.result(out)) is not None]
    values = {"torch": torch.__version__, "results": [asdict(result) for result in results], "problems": problems}
    (out / "results.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    lines = table(results)
    typer.echo("\n".join(lines))
    if page is not None:
        page.write_text(fill(page.read_text(encoding="utf-8"), "trained", lines), encoding="utf-8")
    for name, problem in problems.items():
        typer.echo(f"{name} failed: {problem}")
    if problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except SeqmixError as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(2)
