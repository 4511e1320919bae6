"""The paper's claims, one by one: what is run for each, and what is kept of it."""

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
"""What the page is written from."""

Scale = Literal["cpu", "gpu"]
STUDIES = ("table5", "table6", "figure5", "table4", "figure6", "figure6-batch8")
"""Claims that are a study each, a YAML file of that name."""
TIMED = ("table4", "figure6", "figure6-batch8")
"""Those in which something is timed: nothing else should run."""
OF_RUNS = ("table8", "paradigms")
"""Claims about the runs of figure5."""
LEARNED = ("table6", "table5", "figure5", *OF_RUNS)
"""Those in which something is learned."""
CLAIMS = (*LEARNED, *TIMED)

CONTEXTS = {"cpu": (64, 128, 256), "gpu": (512, 1024, 2048)}
"""A quarter, a half and the whole of a training sequence; its last sixteenth is scored, as in the paper."""
SEQUENCES = 256
"""Sequences of which the last tokens are scored."""
WIDTH = {"cpu": 128, "gpu": 2048}
"""Of the models whose paradigms are compared."""
TIMES = (1, 4)
"""Lengths at which paradigms are compared, in sequences of training."""


def prove(claim: str, *, scale: Scale, jobs: int | None, kept: Path | None, tell: Callable[[str], object]) -> int:
    """Measure one claim of `CLAIMS` on a scale, or go on with it, and write what a page needs of it to `kept`, if
    given.

    Returns:
        An exit status: 0, 1 if runs failed, 130 if it was stopped.

    Raises:
        SeqmixError: there is no such claim, or it cannot be measured.
    """
    require_name("claim", claim, CLAIMS)
    tell(f"{claim}:")
    if claim in STUDIES:
        file = file_of(claim, scale)
        folder = folder_of(claim, scale)
        found, outcome = run_study(plan(load_study(file), file), folder, jobs=jobs, observer=Observer(tell))
        status = STOPPED if outcome.stopped else 1 if outcome.failed else 0
        tell("stopped; the same command resumes it" if outcome.stopped else f"{folder} has report.html and every run")
        if status == 0 and kept is not None:
            values = found.model_dump(mode="json")
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
    """The study of a claim."""
    return (FOLDER if scale == "cpu" else FOLDER / "gpu") / f"{claim}.yaml"


def folder_of(claim: str, scale: Scale) -> Path:
    """Where the study of a claim is made: in the working directory, as others."""
    return Path("studies") / (f"retnet-{claim}" if scale == "cpu" else f"retnet-{claim}-gpu")


def contexts(scale: Scale) -> dict[str, Any]:
    """Table 8: the loss of a sequence's last tokens after more and less of it, by model and size, means over seeds."""
    asked = CONTEXTS[scale]
    scored = asked[-1] // 16
    found: dict[tuple[str, Any], list[list[float]]] = {}
    for run, folder in _runs(scale):
        source = open_text(run.config, folder, asked)
        model = load_run(folder, device=_device())
        measured = by_context(model, source, asked, scored=scored, tokens=SEQUENCES * asked[-1])
        found.setdefault((run.entry, run.config.model.d_model), []).append([context.loss for context in measured])
    models = [
        {"entry": entry, "d_model": width, "seeds": len(losses), "losses": list(map(mean, zip(*losses, strict=True)))}
        for (entry, width), losses in found.items()
    ]
    return {"contexts": list(asked), "scored": scored, "models": models}


def paradigms(scale: Scale) -> dict[str, Any]:
    """That the paradigms are one function: the largest difference of a token's loss, in float32 and in float64."""
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
    """The runs of figure5, and their folders."""
    file = file_of("figure5", scale)
    for run in plan(load_study(file), file).runs:
        yield run, folder_of("figure5", scale) / RUNS / run.name


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _keep(folder: Path, claim: str, values: dict[str, Any]) -> None:
    """Write what a page needs: no curves, and of the machine what plays a part."""
    if "machine" in values:
        values["machine"] = {key: values["machine"].get(key) for key in ("threads", "device", "torch")}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(json.dumps(values, indent=1) + "\n", folder / f"{claim}.json")
