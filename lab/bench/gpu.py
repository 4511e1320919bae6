"""Everything that needs a GPU, in one command: conformance, the benchmarks, and the paper's comparisons.

    seqmix bench-gpu --out DIR --budget 25m

Every part (gpu_plan.py) runs in its own process with a time limit and writes its figures when it ends, so a crash or
an out-of-memory error loses only that part. Parts whose figures are already in DIR are not run again. After each part,
DIR/gpu.json, DIR/gpu.md and the archive DIR.tar.gz of the whole folder are rewritten.
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

from ...registry import format_duration, replacing, write_file
from .benchmark import Report, Row
from .gpu_plan import GROUPS, Part
from .report import fields_of, from_json, markdown
from .timing import Spread

PROGRAM = (sys.executable, "-c", "from seqmix.cli.app import main; main()")
MIN_PART_SECONDS = 15.0
"""A part is started only if this many seconds of the budget are left, because a process needs them to start up."""


@dataclass(frozen=True, kw_only=True)
class PartOutcome:
    """Outcome of a part: its report, or the problem."""

    part: Part
    problem: str | None = None
    """Reason why there are no figures; None if the part succeeded."""
    failed: bool = False
    """True if the part ran and failed; False if it was skipped or not started."""
    seconds: float = 0.0
    report: Report | None = None


def run_process(part: Part, file: Path, *, seconds: float) -> str | None:
    """Run a part in a process; its output goes to a text file beside its report.

    Returns:
        The problem in one line; None if the part succeeded.
    """
    command = [*PROGRAM, *part.command, *(("--json", str(file)) if part.measures else ())]
    log = file.with_suffix(".txt")
    try:
        with log.open("w", encoding="utf-8") as output:
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"stopped at its time limit of {seconds:,.0f} s"
    if done.returncode == 0:
        return None
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ending = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    return f"{ending}: {lines[-1].strip() if lines else 'it printed nothing'} (full output: {log.name})"


def measure(
    parts: Sequence[Part],
    out: Path,
    note: Callable[[str], None],
    runner: Callable[..., str | None] = run_process,
    *,
    time_limit: float = 600.0,
    budget: float = float("inf"),
) -> list[PartOutcome]:
    """Run the parts that have no figures yet, in order, and write all figures into the folder `out` after each part.

    Args:
        parts: the parts, most important first.
        out: the folder for figures, logs and the summary.
        note: called with a line when a part starts.
        runner: runs a part, given its report file and its time limit, and returns the problem or None.
        time_limit: maximum seconds of one part.
        budget: maximum seconds of all parts together; once they are spent, no further part is started.
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
        remaining = end - began
        if problem is None and not file.exists() and remaining < MIN_PART_SECONDS:
            problem = f"not started: the budget of {format_duration(budget)} is spent"
        elif problem is None and not file.exists():
            note(f"{index + 1} of {len(parts)}: {part.group} {part.name}")
            problem = runner(part, file, seconds=min(time_limit, remaining))
            failed = problem is not None
            if problem is None and not part.measures:
                file.write_text("{}\n", encoding="utf-8")  # marks the part as passed
        has_report = part.measures and problem is None and file.exists()
        report = from_json(file.read_text(encoding="utf-8")) if has_report else None
        seconds = time.perf_counter() - began
        outcomes.append(PartOutcome(part=part, problem=problem, failed=failed, seconds=seconds, report=report))
        write(outcomes, out)
    return outcomes


def write(outcomes: Sequence[PartOutcome], out: Path) -> None:
    """Write gpu.json and gpu.md into the folder `out`, and the archive of the folder beside it."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    parts = [
        {
            "group": outcome.part.group,
            "name": outcome.part.name,
            "command": ["seqmix", *outcome.part.command],
            "problem": outcome.problem,
            "seconds": outcome.seconds,
            "report": None if outcome.report is None else fields_of(outcome.report),
        }
        for outcome in outcomes
    ]
    values = {"gpu": gpu, "torch": torch.__version__, "parts": parts}
    write_file(json.dumps(values, indent=2) + "\n", out / "gpu.json")
    text = [f"# {gpu}, torch {torch.__version__}", ""]
    for group, title in GROUPS.items():
        of_group = [outcome for outcome in outcomes if outcome.part.group == group]
        if of_group:
            text += [f"## {title}", "", *_section(of_group), ""]
    write_file("\n".join(text), out / "gpu.md")
    with replacing(out.with_name(f"{out.name}.tar.gz")) as partial, tarfile.open(partial, "w:gz") as archive:
        archive.add(out, out.name)


def _section(outcomes: Sequence[PartOutcome]) -> Iterator[str]:
    reports = [outcome.report for outcome in outcomes if outcome.report is not None]
    if reports:
        report = combine(reports)
        yield markdown(report)
        if len(reports) > 1:
            yield "- Each implementation ran in its own process: ratios are ratios of medians."
    for outcome in outcomes:
        if outcome.problem is not None:
            yield f"- {outcome.part.name}: {outcome.problem}"
        elif not outcome.part.measures:
            yield f"- {outcome.part.name}: passed"


def combine(reports: Sequence[Report]) -> Report:
    """Merge reports that were measured one after another; ratios become ratios of medians."""
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
