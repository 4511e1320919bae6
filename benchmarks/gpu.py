"""Everything that a GPU is needed for, in one command: conformance, the benchmarks, and the paper's comparisons.

    seqmix bench-gpu --out DIR --budget 1500

Every part (gpu_plan.py) runs in a process of its own with a time limit, and its figures are written when it ends: a
crash, or memory that runs out, loses nothing else. Parts whose figures lie in DIR already are not run again. After each
part DIR/gpu.json, DIR/gpu.md, and DIR.tar.gz with all that there is are written again.
"""

import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..registry import replacing, write_file
from .benchmark import Report, Row
from .gpu_plan import GROUPS, Part
from .measure import Spread
from .report import from_json, markdown, to_json

PROGRAM = (sys.executable, "-c", "from seqmix.cli import main; main()")
LEAST = 15.0
"""Seconds without which no part is begun: a process needs them to start."""


@dataclass(frozen=True, kw_only=True)
class PartOutcome:
    """What became of a part."""

    part: Part
    problem: str | None = None
    """Why there are no figures, or what failed."""
    failed: bool = False
    """Whether it ran and did not end well."""
    seconds: float = 0.0
    report: Report | None = None


def run_process(part: Part, file: Path, *, seconds: float) -> str | None:
    """Run a part; what it prints goes beside its report."""
    command = [*PROGRAM, *part.command, *(("--json", str(file)) if part.measures else ())]
    log = file.with_suffix(".txt")
    try:
        with log.open("w", encoding="utf-8") as to:
            done = subprocess.run(command, stdout=to, stderr=subprocess.STDOUT, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:,.0f} s"
    if done.returncode == 0:
        return None
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    how = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    return f"{how}: {lines[-1].strip() if lines else 'it printed nothing'} (all of it: {log.name})"


def measure(
    parts: Sequence[Part],
    out: Path,
    note: Callable[[str], None],
    runner: Callable[..., str | None] = run_process,
    *,
    time_limit: float = 600.0,
    budget: float = float("inf"),
) -> list[PartOutcome]:
    """Run the parts that have not been run, in order, and write what there is into the folder `out` after each.

    `runner` runs a part, with its file and its seconds, and returns what went wrong; `note` is given the part that
    begins, in words. A part may take `time_limit` seconds, all together `budget`: what is left then is not begun.
    """
    folder = out / "parts"
    end = time.perf_counter() + budget
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[PartOutcome] = []
    for index, part in enumerate(parts):
        file = folder / f"{part.group}--{part.name.replace(':', '-').replace('/', '-')}.json"
        began = time.perf_counter()
        failed = False
        problem = part.skipped
        left = end - began
        if problem is None and not file.exists() and left < LEAST:
            problem = f"not begun: the budget of {budget:,.0f} s is spent"
        elif problem is None and not file.exists():
            note(f"{index + 1} of {len(parts)}: {part.group} {part.name}")
            problem = runner(part, file, seconds=min(time_limit, left))
            failed = problem is not None
            if problem is None and not part.measures:
                file.write_text("{}\n", encoding="utf-8")  # passed
        there = part.measures and problem is None and file.exists()
        report = from_json(file.read_text(encoding="utf-8")) if there else None
        took = time.perf_counter() - began
        outcomes.append(PartOutcome(part=part, problem=problem, failed=failed, seconds=took, report=report))
        write(outcomes, out)
    return outcomes


def write(outcomes: Sequence[PartOutcome], out: Path) -> None:
    """gpu.json and gpu.md."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    parts = [
        {
            "group": outcome.part.group,
            "name": outcome.part.name,
            "command": ["seqmix", *outcome.part.command],
            "problem": outcome.problem,
            "seconds": outcome.seconds,
            "report": None if outcome.report is None else json.loads(to_json(outcome.report)),
        }
        for outcome in outcomes
    ]
    values = {"gpu": gpu, "torch": torch.__version__, "parts": parts}
    write_file(json.dumps(values, indent=2) + "\n", out / "gpu.json")
    text = [f"# {gpu}, torch {torch.__version__}", ""]
    for group, title in GROUPS.items():
        found = [outcome for outcome in outcomes if outcome.part.group == group]
        if found:
            text += [f"## {title}", "", *_section(found), ""]
    write_file("\n".join(text), out / "gpu.md")
    with replacing(out.with_name(f"{out.name}.tar.gz")) as partial, tarfile.open(partial, "w:gz") as archive:
        archive.add(out, out.name)


def _section(outcomes: Sequence[PartOutcome]) -> Iterator[str]:
    reports = [outcome.report for outcome in outcomes if outcome.report is not None]
    if reports:
        report = combined(reports)
        yield markdown(report)
        if len(reports) > 1:
            yield "- Each ran in a process of its own: ratios are of medians."
    for outcome in outcomes:
        if outcome.problem is not None:
            yield f"- {outcome.part.name}: {outcome.problem}"
        elif not outcome.part.measures:
            yield f"- {outcome.part.name}: passed"


def combined(reports: Sequence[Report]) -> Report:
    """One report of several that were measured one after another, with ratios of medians."""
    if len(reports) == 1:
        return reports[0]
    rows: list[Row] = sorted((row for report in reports for row in report.rows), key=lambda row: row.length)
    first: dict[tuple[str, int], float] = {}
    for i, row in enumerate(rows):
        if row.seconds is not None:
            reference = first.setdefault((row.what, row.length), row.seconds.median)
            times = (row.seconds.median, row.seconds.low, row.seconds.high)
            rows[i] = replace(row, ratio=Spread(*(x / reference for x in times)))
    return replace(reports[0], rows=rows)
