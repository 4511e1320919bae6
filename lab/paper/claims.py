"""The claims of the RetNet paper: how each is measured. `verdict` compares the values with the paper's."""

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
from ..study.plan import Plan, PlannedRun, plan
from ..study.report import REPORT_FILE
from ..study.results_file import RESULTS_FILE
from ..study.run_results import RUNS
from ..study.runner import Observer, run_study
from ..study.study import load_study
from ..study.worker import STOPPED
from .verdict import Verdict, judge

FOLDER = Path(__file__).parent
"""Folder of the studies' YAML files."""

Scale = Literal["cpu", "gpu"]
STUDIES = ("table5", "table6", "figure5", "table4", "figure6", "figure6-batch8")
"""Claims that are measured by a study of their own, the YAML file of that name."""
TIMED = ("table4", "figure6", "figure6-batch8")
"""Claims about speed: nothing else should run on the machine meanwhile."""
OF_RUNS = ("table8", "paradigms")
"""Claims that are measured on the trained models of figure5."""
QUESTIONS = {
    "table8": "How much does the loss of the same tokens fall with more context?",
    "paradigms": "Do the three paradigms compute the same losses?",
}
"""Questions of the claims of `OF_RUNS`; the other claims have that of their study."""
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


def prove(
    claim: str, *, scale: Scale, jobs: int | None, out: Path, on_note: Callable[[str], object]
) -> tuple[int, Verdict | None]:
    """Measure one claim, or resume its measurement, and compare it with the paper.

    Args:
        claim: one of `CLAIMS`.
        scale: the size of the models.
        jobs: the number of runs at once; None for the default.
        out: the folder for the studies; `values_of` names the file with a claim's values.
        on_note: called with lines on the progress.

    Returns:
        The exit status (0 for success, 1 if runs failed, 130 if it was stopped), and the verdict, None without success.

    Raises:
        SeqmixError: the claim does not exist, or cannot be measured.
    """
    planned = plan_claim(claim, scale)
    on_note(f"{claim}:")
    folder = folder_of(study_of(claim), scale, out)
    results, outcome = run_study(planned, folder, jobs=jobs, observer=Observer(on_note))
    if outcome.stopped:
        on_note("stopped: rerun the same command to resume")
        return STOPPED, None
    on_note(f"the report is {folder / REPORT_FILE}")
    if outcome.failed:
        return 1, None
    if claim in STUDIES:
        return 0, judge(claim, results)
    values = contexts(scale, out) if claim == "table8" else paradigms(scale, out)
    write_file(json.dumps(values, indent=1) + "\n", values_of(claim, scale, out))
    return 0, judge(claim, values)


def study_of(claim: str) -> str:
    """Return the name of the study whose runs a claim is measured on; SeqmixError if there is no such claim."""
    require_name("claim", claim, CLAIMS)
    return claim if claim in STUDIES else "figure5"


def plan_claim(claim: str, scale: Scale) -> Plan:
    """Plan the runs of a claim's study."""
    file = file_of(study_of(claim), scale)
    return plan(load_study(file), file)


def question_of(claim: str, scale: Scale) -> str:
    """Return the question that a claim answers."""
    return QUESTIONS.get(claim) or load_study(file_of(claim, scale)).question or ""


def file_of(claim: str, scale: Scale) -> Path:
    """Return the YAML file of a claim's study."""
    return (FOLDER if scale == "cpu" else FOLDER / "gpu") / f"{claim}.yaml"


def folder_of(claim: str, scale: Scale, out: Path) -> Path:
    """Return the folder of a claim's study."""
    return out / (f"retnet-{claim}" if scale == "cpu" else f"retnet-{claim}-gpu")


def values_of(claim: str, scale: Scale, out: Path) -> Path:
    """Return the file with the values of a claim: a study's results, or what is measured on the models of figure5."""
    if claim in STUDIES:
        return folder_of(claim, scale, out) / RESULTS_FILE
    return folder_of("figure5", scale, out) / f"{claim}.json"


def contexts(scale: Scale, out: Path) -> dict[str, Any]:
    """Measure Table 8: the loss of a sequence's last tokens by context length, for each model; means over seeds."""
    lengths = CONTEXTS[scale]
    scored = lengths[-1] // 16
    losses_by_model: dict[tuple[str, Any], list[list[float]]] = {}
    for run, folder in _runs(scale, out):
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


def paradigms(scale: Scale, out: Path) -> dict[str, Any]:
    """Measure how far paradigms differ: the largest difference of a token's loss, in float32 and in float64."""
    rows = []
    for run, folder in _runs(scale, out):
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


def _runs(scale: Scale, out: Path) -> Iterator[tuple[PlannedRun, Path]]:
    """Yield the runs of figure5 and their folders."""
    file = file_of("figure5", scale)
    for run in plan(load_study(file), file).runs:
        yield run, folder_of("figure5", scale, out) / RUNS / run.name


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
