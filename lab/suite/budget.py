"""The part of the suite that fits into a time budget, from steps that are timed on this machine."""

import time
from collections.abc import Mapping, Sequence

import torch

from ...models import build_model
from ...registry import SeqmixError
from ...training.trainer import Trainer
from ..study.plan import PlannedRun
from .tasks import Extent, PlannedTask

LADDER = (
    Extent(),
    Extent(one_rate=True),
    Extent(one_rate=True, one_seed=True),
    Extent(steps=0.7, one_rate=True, one_seed=True),
    Extent(steps=0.5, one_rate=True, one_seed=True),
)
"""Extents to try, largest first; the first at which at least one task fits is used, with all tasks that fit."""
STEPS = 3
"""Number of timed steps; the fastest counts."""
START = 5.0
"""Assumed time that the process of a run takes to start and to end, in seconds."""


def time_runs(tasks: Sequence[PlannedTask]) -> dict[str, dict[str, float]]:
    """Estimate the seconds of one run, by task and entry: steps, evaluations, and the start of the process."""
    threads = torch.get_num_threads()
    seconds: dict[str, dict[str, float]] = {}
    for planned in tasks:
        torch.set_num_threads(planned.plan.study.threads)
        first_runs = {run.entry: run for run in reversed(planned.plan.runs)}
        seconds[planned.name] = {entry: _seconds(run) for entry, run in first_runs.items()}
    torch.set_num_threads(threads)
    return seconds


def _seconds(run: PlannedRun) -> float:
    config = run.config
    gpu = torch.cuda.is_available()
    model = build_model(config.model, seed=config.seed).to("cuda" if gpu else "cpu")
    # on a CPU, count the process's CPU time, which other load does not change
    clock = time.perf_counter if gpu else time.process_time
    trainer = Trainer(config, config.open_data(), model, torch.optim.AdamW(model.parameters()))
    times = []
    for step in range(STEPS):
        began = clock()
        trainer.train_step(step)
        times.append(clock() - began)
    began = clock()
    trainer.evaluate()
    evaluation = clock() - began
    began = clock()
    trainer.evaluate(final=True)
    last = clock() - began
    evaluations = -(-config.training.steps // config.training.evaluate_every)
    return START + min(times) * config.training.steps + evaluation * evaluations + last


def fit(
    times: Mapping[str, Mapping[str, float]], rates: Mapping[str, int], seeds: int, budget: float
) -> tuple[Extent, list[str], float]:
    """Return the part of the suite that fits into a budget.

    Few tasks with tuning and all seeds are preferred to many tasks without.

    Args:
        times: seconds of a run, by task and entry, most important task first.
        rates: number of learning rates of each task.
        seeds: number of seeds.
        budget: core-seconds that all runs together may take.

    Returns:
        The extent of the runs, the tasks, and the core-seconds of all runs.

    Raises:
        SeqmixError: not even one task fits.
    """
    for extent in LADDER:
        names: list[str] = []
        seconds = 0.0
        for name in times:
            seconds_of_task = cost(times[name], rates[name], seeds, extent)
            if seconds + seconds_of_task > budget:
                break
            names.append(name)
            seconds += seconds_of_task
        if names:
            return extent, names, seconds
    least = cost(next(iter(times.values())), 1, 1, LADDER[-1])
    raise SeqmixError(
        f"no task fits into the budget: the first alone takes about {least / 60:.1f} core-minutes; raise --budget, "
        "name fewer mixers, or choose other --tasks"
    )


def cost(times: Mapping[str, float], rates: int, seeds: int, extent: Extent) -> float:
    """Return the seconds of all runs of a task at an extent; `times` are the seconds of one full run by entry."""
    tuning = 0 if extent.one_rate or rates < 2 else rates  # with one tuning seed
    runs = tuning + (1 if extent.one_seed else seeds)
    return runs * sum(START + (seconds - START) * extent.steps for seconds in times.values())


def left_out(extent: Extent, names: Sequence[str], all_names: Sequence[str]) -> list[str]:
    """Return sentences on what a budget leaves out; `names` are the chosen tasks, `all_names` those of all tasks."""
    sentences = []
    if missing := [name for name in all_names if name not in names]:
        sentences.append(f"The budget leaves out {', '.join(missing)}.")
    if extent.steps < 1:
        sentences.append(f"Runs have {extent.steps:.0%} of their steps, so scores are lower than those of full runs.")
    if extent.one_rate:
        sentences.append("Learning rates are not tuned: every mixer has the first of each grid.")
    if extent.one_seed:
        sentences.append("There is only one seed, so there are no intervals: differences may be chance.")
    return sentences
