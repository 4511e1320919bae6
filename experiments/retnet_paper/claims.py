"""The claims of the RetNet paper: how each is measured, and the values that are saved for the page."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch

from ...mixers import Paradigm
from ...registry import require_name, write_file
from ...training import load_run
from ...training.length_eval import by_context, by_length, open_text
from ..collect import RUNS
from ..plan import PlannedRun, plan
from ..runner import Observer, run_study
from ..study import load_study
from ..worker import STOPPED

FOLDER = Path(__file__).parent
KEPT = FOLDER / "results"
"""Folder of the saved values, from which the page is generated."""

Scale = Literal["cpu", "gpu"]
STUDIES = ("table5", "table6", "figure5", "table4", "figure6", "figure6-batch8")
"""Claims that are measured by a study of their own, the YAML file of that name."""
TIMED = ("table4", "figure6", "figure6-batch8")
"""Claims about speed: nothing else should run on the machine meanwhile."""
OF_RUNS = ("table8", "paradigms")
"""Claims that are measured on the trained models of figure5."""
LEARNED = ("table6", "table5", "figure5", *OF_RUNS)
"""Claims about trained models."""
CLAIMS = (*LEARNED, *TIMED)

CONTEXTS = {"cpu": (64, 128, 256), "gpu": (512, 1024, 2048)}
"""Context lengths of Table 8, by scale: a quarter, a half and the whole of a training sequence.

The loss is measured on the last sixteenth of the sequence, as in the paper.
"""
SEQUENCES = 256
"""Number of sequences whose loss is measured for Table 8."""
WIDTH = {"cpu": 128, "gpu": 2048}
"""d_model of the models whose paradigms are compared."""
TIMES = (1, 4)
"""Lengths at which paradigms are compared, in multiples of the training length."""


def prove(claim: str, *, scale: Scale, jobs: int | None, kept: Path | None, tell: Callable[[str], object]) -> int:
    """Measure one claim, or resume its measurement, and write the values for docs/explanation/paper.md.

    Args:
        claim: one of `CLAIMS`.
        scale: the size of the models.
        jobs: the number of runs at once; None for the default.
        kept: the folder for the values; None to write none.
        tell: called with lines on the progress.

    Returns:
        The exit status: 0 for success, 1 if runs failed, 130 if it was stopped.

    Raises:
        SeqmixError: the claim does not exist, or cannot be measured.
    """
    require_name("claim", claim, CLAIMS)
    tell(f"{claim}:")
    if claim in STUDIES:
        file = file_of(claim, scale)
        folder = folder_of(claim, scale)
        results, outcome = run_study(plan(load_study(file), file), folder, jobs=jobs, observer=Observer(tell))
        status = STOPPED if outcome.stopped else 1 if outcome.failed else 0
        tell("stopped: rerun the same command to resume" if outcome.stopped else f"the report is {folder}/report.html")
        if status == 0 and kept is not None:
            values = results.model_dump(mode="json")
            for run in values["runs"]:
                run.update(history=[], evaluations=[])
            _keep(kept, claim, values)
        return status
    if status := prove("figure5", scale=scale, jobs=jobs, kept=kept, tell=tell):
        return status
    values = contexts(scale) if claim == "table8" else paradigms(scale)
    if kept is not None:
        _keep(kept, claim, values)
    return 0


def file_of(claim: str, scale: Scale) -> Path:
    """Return the YAML file of a claim's study."""
    return (FOLDER if scale == "cpu" else FOLDER / "gpu") / f"{claim}.yaml"


def folder_of(claim: str, scale: Scale) -> Path:
    """Return the folder of a claim's study, in the working directory."""
    return Path("studies") / (f"retnet-{claim}" if scale == "cpu" else f"retnet-{claim}-gpu")


def contexts(scale: Scale) -> dict[str, Any]:
    """Measure Table 8: the loss of a sequence's last tokens by context length, for each model; means over seeds."""
    lengths = CONTEXTS[scale]
    scored = lengths[-1] // 16
    losses_by_model: dict[tuple[str, Any], list[list[float]]] = {}
    for run, folder in _runs(scale):
        source = open_text(run.config, folder, lengths)
        model = load_run(folder, device=_device())
        measured = by_context(model, source, lengths, scored=scored, tokens=SEQUENCES * lengths[-1])
        losses = [context.loss for context in measured]
        losses_by_model.setdefault((run.entry, run.config.model.d_model), []).append(losses)
    models = [
        {"entry": entry, "d_model": width, "seeds": len(losses), "losses": list(map(mean, zip(*losses, strict=True)))}
        for (entry, width), losses in losses_by_model.items()
    ]
    return {"contexts": list(lengths), "scored": scored, "models": models}


def paradigms(scale: Scale) -> dict[str, Any]:
    """Measure how far paradigms differ: the largest difference of a token's loss, in float32 and in float64."""
    rows = []
    for run, folder in _runs(scale):
        if (run.config.seed, run.config.model.d_model) != (0, WIDTH[scale]):
            continue
        lengths = [times * run.config.data.sequence_length for times in TIMES]
        source = open_text(run.config, folder, lengths)
        for dtype in (torch.float32, torch.float64):
            model = load_run(folder, device=_device()).to(dtype)
            for length in by_length(model, source, lengths, paradigms=lambda _: list(Paradigm), tokens=2**13):
                rows.append({"entry": run.entry, "dtype": str(dtype).removeprefix("torch."), **asdict(length)})
                del rows[-1]["positions"]
    return {"rows": rows}


def _runs(scale: Scale) -> Iterator[tuple[PlannedRun, Path]]:
    """Yield the runs of figure5 and their folders."""
    file = file_of("figure5", scale)
    for run in plan(load_study(file), file).runs:
        yield run, folder_of("figure5", scale) / RUNS / run.name


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _keep(folder: Path, claim: str, values: dict[str, Any]) -> None:
    """Write the values of a claim as JSON; of the machine, only threads, device and torch version are kept."""
    if "machine" in values:
        values["machine"] = {key: values["machine"].get(key) for key in ("threads", "device", "torch")}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(json.dumps(values, indent=1) + "\n", folder / f"{claim}.json")
