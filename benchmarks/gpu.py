"""Everything that a GPU is needed for, in one command: conformance, the benchmarks, and the paper's comparisons.

    seqmix bench-gpu --out DIR

Every part runs in a process of its own with a time limit, and its figures are written when it ends: a crash, or memory
that runs out, loses nothing else. Parts whose figures lie in DIR already are not run again. DIR/gpu.json and
DIR/gpu.md are rewritten after each part.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..mixers import MIXERS
from ..ops.kernels import Probe, all_kernels
from ..registry import write_file
from .measure import Spread
from .models import model_to_measure
from .peers import PEERS, Size
from .report import from_json, markdown, to_json
from .suite import Report, Row

PROGRAM = (sys.executable, "-c", "from seqmix.cli import main; main()")

GROUPS = {
    "kernels": "Kernels against the definitions of their ops, on the GPU",
    "conformance": "The conformance kit on the GPU",
    "op": "The op, at the paper's head size",
    "recurrence": "Recurrences of every op family",
    "train": "Training, 200M parameters",
    "decode": "Decoding, 200M parameters",
    "prefill": "Reading a prompt, 200M parameters",
    "paper-train": "The paper's Table 4: training at 1.3B parameters and 8,192 tokens",
    "paper-train-checkpointed": "The same, activations recomputed in backward",
    "paper-decode": "The paper's Figure 6: decoding at 6.7B parameters, eight sequences after 8,192 tokens",
}
"""What the parts belong to, in the order of the report."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process."""

    group: str
    name: str
    command: tuple[str, ...]
    """Arguments of `seqmix`."""
    skipped: str | None = None
    """Why it is not started."""

    @property
    def measures(self) -> bool:
        """Whether it writes a report."""
        return self.command[0] == "bench"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a part."""

    part: Part
    problem: str | None = None
    """Why there are no figures, or what failed."""
    seconds: float = 0.0
    report: Report | None = None


def plan(memory: int) -> Iterator[Part]:
    """All parts, for a GPU with so many bytes of memory; first what shows whether figures mean anything."""
    device = torch.device("cuda")
    for name, kernel in all_kernels().items():
        least = Probe(device=device, dtype=torch.bfloat16, key_width=64, value_width=64)
        reasons = None if kernel.reference else "; ".join(kernel.unsupported(least))
        yield Part(group="kernels", name=name, command=("check", name, "--device", "cuda"), skipped=reasons or None)
    for kind in MIXERS.kinds():
        yield Part(group="conformance", name=kind, command=("check", kind, "--device", "cuda"))
    common = ("--device", "cuda", "--dtype", "bfloat16", "--limit", "30")
    lengths = ("--length", "2048", "--length", "8192")
    longer = (*lengths, "--length", "32768")
    # a small vocabulary: all are in memory together
    model = ("retnet-200m", "model.vocab_size=8192")
    for group, words in (
        ("op", ("retnet-1.3b", *longer, "--batch", "2")),
        ("recurrence", ("--length", "2048", "--only", "chunkwise")),
        ("train", (*model, *lengths, "--length", "16384", "--tokens", "16384", "--compile")),
        ("decode", (*model, *longer, "--batch", "8", "--compile")),
        ("prefill", (*model, *longer, "--compile")),
    ):
        yield Part(group=group, name=group, command=("bench", group, *words, *common))
    train = ("train", "retnet-1.3b", "--length", "8192", "--tokens", "8192", *common)
    decode = ("decode", "retnet-6.7b", *lengths, "--batch", "8", *common)
    yield from _paper("paper-train", train, 16, memory)
    yield from _paper("paper-train-checkpointed", (*train, "--activation-checkpointing"), 16, memory)
    yield from _paper("paper-decode", decode, 2, memory)


def _paper(group: str, words: Sequence[str], bytes_each: int, memory: int) -> Iterator[Part]:
    """A part a peer: two of this size are not in memory together."""
    benchmark, preset = words[:2]
    size = Size(model_to_measure(preset, ()))
    needed, gib = size.parameters * bytes_each, 2**30
    for kind in (kind for kind in PEERS if kind.name != "by-hand"):
        reason = kind.missing(size, torch.device("cuda"))
        if reason is None and needed > memory:
            reason = f"parameters alone take {needed / gib:,.0f} GiB, and the GPU has {memory / gib:,.0f}"
        names = [kind.name] if benchmark in kind.roles else []
        names += [f"{kind.name}-compiled"] if benchmark in kind.compiled_roles else []
        for name in names:
            only = ("--compile", "--only", name)
            yield Part(group=group, name=name, command=("bench", *words, *only), skipped=reason)


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
    parts: Sequence[Part], out: Path, runner: Callable[[Part, Path], str | None], note: Callable[[str], None]
) -> list[Outcome]:
    """Run what has not been run, and write what there is after each part; `runner` returns what went wrong."""
    folder = out / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for index, part in enumerate(parts):
        file = folder / f"{part.group}--{part.name.replace(':', '-').replace('/', '-')}.json"
        began = time.perf_counter()
        problem = part.skipped
        if problem is None and not file.exists():
            note(f"{index + 1} of {len(parts)}: {part.group} {part.name}")
            problem = runner(part, file)
            if problem is None and not part.measures:
                file.write_text("{}\n", encoding="utf-8")  # passed
        there = part.measures and problem is None and file.exists()
        report = from_json(file.read_text(encoding="utf-8")) if there else None
        outcomes.append(Outcome(part=part, problem=problem, seconds=time.perf_counter() - began, report=report))
        write(outcomes, out)
    return outcomes


def write(outcomes: Sequence[Outcome], out: Path) -> None:
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


def _section(outcomes: Sequence[Outcome]) -> Iterator[str]:
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
