"""How much of the suite fits into a time, by steps that are timed on this machine."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from ...models import build_model
from ...registry import SeqmixError
from ...training.trainer import Trainer
from ..plan import PlannedRun
from .tasks import Extent, PlannedTask

LADDER = (
    Extent(),
    Extent(one_rate=True),
    Extent(one_rate=True, one_seed=True),
    Extent(steps=0.7, one_rate=True, one_seed=True),
    Extent(steps=0.5, one_rate=True, one_seed=True),
)
"""What is tried, the most first: then tasks are left out, from the last."""
STEPS = 3
"""Steps that are timed; the fastest counts."""
START = 5.0
"""Seconds for a process to begin and to end."""
UNITS = {"s": 1, "m": 60, "h": 3600}


def seconds_of(text: str) -> float:
    """A duration: 90s, 30m, 2h, or 1h30m.

    Raises:
        SeqmixError: it is none.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
    if not parts or "".join(map("".join, parts)) != text:
        raise SeqmixError(f"a budget is a duration such as 90s, 30m or 1h30m, and was given {text!r}")
    return sum(float(number) * UNITS[unit] for number, unit in parts)


def time_runs(tasks: Sequence[PlannedTask]) -> dict[str, dict[str, float]]:
    """Seconds that one run of each entry takes, by task and entry: steps, evaluations, and the start of a process."""
    threads = torch.get_num_threads()
    found: dict[str, dict[str, float]] = {}
    for planned in tasks:
        torch.set_num_threads(planned.plan.study.threads)
        firsts = {run.entry: run for run in reversed(planned.plan.runs)}
        found[planned.name] = {entry: _seconds(run) for entry, run in firsts.items()}
    torch.set_num_threads(threads)
    return found


def _seconds(run: PlannedRun) -> float:
    config = run.config
    gpu = torch.cuda.is_available()
    model = build_model(config.model, seed=config.seed).to("cuda" if gpu else "cpu")
    # on a CPU the time of a core, which does not depend on what else runs
    clock = time.perf_counter if gpu else time.process_time
    trainer = Trainer(config, config.open_data(), model, torch.optim.AdamW(model.parameters()))
    times = []
    for step in range(STEPS):
        began = clock()
        trainer.train_step(step)
        times.append(clock() - began)
    began = clock()
    trainer.evaluate()
    evaluations = -(-config.training.steps // config.training.evaluate_every)
    return START + min(times) * config.training.steps + (clock() - began) * (evaluations + 2)


def fit(
    times: Mapping[str, Mapping[str, float]], rates: Mapping[str, int], seeds: int, budget: float
) -> tuple[Extent, list[str], float]:
    """The largest part of the suite that fits.

    Args:
        times: seconds of a run, by task and entry, most important task first.
        rates: learning rates of each task.
        seeds: how many.
        budget: seconds that all runs may take, one after another.

    Returns:
        What is run; the tasks; the seconds that it takes.

    Raises:
        SeqmixError: not even one task fits.
    """
    for extent, names in _ladder(list(times)):
        took = sum(cost(times[name], rates[name], seeds, extent) for name in names)
        if took <= budget:
            return extent, names, took
    least = cost(next(iter(times.values())), 1, 1, LADDER[-1])
    raise SeqmixError(
        f"nothing fits into the budget: the first task alone takes about {least / 60:.1f} core-minutes; give more, "
        "fewer mixers, or --tasks"
    )


def cost(times: Mapping[str, float], rates: int, seeds: int, extent: Extent) -> float:
    """Seconds of all runs of a task."""
    runs = (1 if extent.one_rate else rates) * (1 if extent.one_seed else seeds)
    return runs * sum(START + (seconds - START) * extent.steps for seconds in times.values())


def _ladder(names: list[str]) -> Iterator[tuple[Extent, list[str]]]:
    yield from ((extent, names) for extent in LADDER)
    yield from ((LADDER[-1], names[:count]) for count in range(len(names) - 1, 0, -1))


def left_out(extent: Extent, names: Sequence[str], every: Sequence[str]) -> list[str]:
    """What a budget leaves out, a sentence each."""
    said = []
    if missing := [name for name in every if name not in names]:
        said.append(f"The budget leaves out {', '.join(missing)}.")
    if extent.steps < 1:
        said.append(f"Runs have {extent.steps:.0%} of their steps: figures are lower than those of whole runs.")
    if extent.one_rate:
        said.append("One learning rate is tried of each grid.")
    if extent.one_seed:
        said.append("There is one seed, so how much is chance is not known.")
    return said
