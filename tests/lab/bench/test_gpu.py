"""The bench-gpu command: its plan, skipped parts and output files; no part is actually measured."""

import json
import re
import sys
import tarfile

import pytest
import torch

from seqmix import MIXERS
from seqmix.cli.commands.bench import BENCHMARKS
from seqmix.lab.bench import gpu
from seqmix.lab.bench.benchmark import Report, Row
from seqmix.lab.bench.gpu import combine, measure, run_process
from seqmix.lab.bench.gpu_plan import GROUPS, Part, plan
from seqmix.lab.bench.report import to_json
from seqmix.lab.bench.timing import Spread
from seqmix.ops.runtime.kernel import all_kernels

GIB = 2**30
MACHINE = {"device": "a GPU", "torch": "2.13"}


def report(name, *milliseconds, length=8192):
    seconds = [Spread(ms / 1e3, ms / 2e3, ms / 5e2) for ms in milliseconds]
    rows = [
        Row(what="train", length=length * (i + 1), name=name, tokens=8192, seconds=x, ratio=Spread(1.0, 1.0, 1.0))
        for i, x in enumerate(seconds)
    ]
    settings = {"dtype": "bfloat16", "repeat": 5}
    return Report(benchmark="train", title="Training", machine=MACHINE, settings=settings, rows=rows)


@pytest.fixture
def parts():
    return [
        Part(group="conformance", name="retention", command=("check", "retention")),
        Part(group="conformance", name="wrong", command=("check", "wrong")),
        *(Part(group="paper-train", name=name, command=("bench", "train")) for name in ("seqmix", "crashing", "llama")),
        Part(group="paper-train", name="fla", command=("bench", "train"), skipped="fla is not installed"),
    ]


def silent(text):
    pass


def stub(part, file, *, seconds=None):
    """Write the report that a process would write."""
    if part.name in ("wrong", "crashing"):
        return "killed by signal 9: it printed nothing"
    if part.measures:
        file.write_text(to_json(report(part.name, {"seqmix": 20.0, "llama": 30.0}[part.name])))
    return None


# ---- the plan


def test_plan_covers_all_mixers_benchmarks_and_paper_sizes():
    parts = list(plan(80 * GIB))
    assert list(dict.fromkeys(part.group for part in parts)) == list(GROUPS)
    heads = [part.command for part in parts if part.group == "headline"]
    assert len(heads) == 3
    assert all(words[words.index("--batch") + 1] == "8" and "4096" in words for words in heads)
    assert [part.name for part in parts if part.group == "conformance"] == list(MIXERS.kinds())
    assert {part.group for part in parts} >= set(BENCHMARKS)
    assert len({(part.group, part.name) for part in parts}) == len(parts)
    kernels = {part.name: part for part in parts if part.group in ("kernels", "references")}
    assert parts[0].name.endswith("triton")
    assert set(kernels) == set(all_kernels())
    assert kernels["decay/chunkwise/reference"].skipped is None
    assert kernels["decay/chunkwise/triton"].command == ("check", "decay/chunkwise/triton", "--device", "cuda")
    paper = {(part.group, part.name): part.command for part in parts if part.group.startswith("paper")}
    train = paper["paper-train", "seqmix"]
    assert train[:3] == ("bench", "train", "retnet-1.3b")
    assert train[train.index("--length") + 1] == "8192"
    assert ("paper-train", "llama") in paper
    assert ("paper-train", "seqmix-compiled") in paper
    assert "--activation-checkpointing" in paper["paper-train-checkpointed", "seqmix"]
    decode = paper["paper-decode", "seqmix"]
    assert decode[:3] == ("bench", "decode", "retnet-6.7b")
    assert "8192" in decode


def test_largest_batch_leaves_room_for_the_weights():
    batch = {
        part.name: int(part.command[part.command.index("--batch") + 1])
        for part in plan(80 * GIB)
        if part.group == "decode-largest"
    }
    # 13.7 GB of weights; 268 MB of state, and 4.3 GB of keys and values a sequence
    assert 230 < batch["seqmix"] <= (80 * GIB - 13.4e9) / (32 * 16 * 256 * 512 * 4)
    assert batch["llama"] == 16


def test_rehearsal_without_a_gpu_plans_parts_of_every_group(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    parts = list(plan(80 * GIB, rehearsal=True))
    assert list(dict.fromkeys(part.group for part in parts)) == list(GROUPS)
    assert all("cuda" not in part.command for part in parts)
    assert "seqmix" in {part.name for part in parts if part.skipped is None and part.group == "paper-decode"}


def test_parts_too_large_for_gpu_memory_are_skipped():
    skipped = {(part.group, part.name): part.skipped for part in plan(16 * GIB)}
    assert skipped["paper-train", "seqmix"].startswith("parameters alone take ")
    assert skipped["paper-train", "seqmix"].endswith(" GiB, but the GPU has 16 GiB")
    assert skipped["op", "op"] is None
    assert {(part.group, part.name): part.skipped for part in plan(80 * GIB)}["paper-train", "seqmix"] is None


def test_planned_commands_are_valid(refused):
    # all but the device is checked first
    for part in plan(80 * GIB):
        if part.measures and not torch.cuda.is_available():
            assert refused(*part.command).startswith("device 'cuda' cannot be used here")


# ---- parts


def test_failed_part_does_not_affect_other_results(parts, tmp_path):
    outcomes = measure(parts, tmp_path, silent, stub)
    assert [outcome.problem is None for outcome in outcomes] == [True, False, True, False, True, False]
    assert [outcome.part.name for outcome in outcomes if outcome.failed] == ["wrong", "crashing"]
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["name"] for part in written["parts"]] == [part.name for part in parts]
    assert written["parts"][2]["report"]["rows"][0]["seconds"]["median"] == 0.02
    text = (tmp_path / "gpu.md").read_text()
    for line in (
        "- retention: passed",
        "- wrong: killed by signal 9: it printed nothing",
        "- crashing: killed by signal 9: it printed nothing",
        "- fla: fla is not installed",
    ):
        assert line in text.splitlines()
    assert "| 8,192 | llama | 30.0 |" in text
    assert " 1.50 |" in text


def test_results_are_written_after_each_part(parts, tmp_path):
    def runner(part, file, *, seconds):
        if part.name == "llama":
            raise KeyboardInterrupt
        return stub(part, file)

    with pytest.raises(KeyboardInterrupt):
        measure(parts, tmp_path, silent, runner)
    assert len(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == 4


def test_budget_limits_time_and_reports_skipped_parts(parts, tmp_path, monkeypatch):
    clock, given = iter(range(0, 1000, 10)), []
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: float(next(clock)))

    def runner(part, file, *, seconds):
        given.append((part.name, seconds))
        return stub(part, file)

    outcomes = measure(parts, tmp_path, silent, runner, time_limit=50.0, budget=85.0)
    assert given == [("retention", 50.0), ("wrong", 50.0), ("seqmix", 35.0), ("crashing", 15.0)]
    assert outcomes[4].problem == "not started: the budget of 1m25s is spent"
    assert outcomes[5].problem == "fla is not installed"


def test_archive_contains_all_results_after_each_part(parts, tmp_path):
    def runner(part, file, *, seconds):
        if part.name == "llama":
            raise KeyboardInterrupt
        return stub(part, file)

    with pytest.raises(KeyboardInterrupt):
        measure(parts, tmp_path / "gpu", silent, runner)
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        names = set(archive.getnames())
        written = json.load(archive.extractfile("gpu/gpu.json"))
    assert names >= {"gpu/gpu.md", "gpu/parts/paper-train--seqmix.json"}
    assert len(written["parts"]) == 4


def test_rerun_repeats_only_failed_parts(parts, tmp_path):
    measure(parts, tmp_path, silent, stub)
    again = []

    def runner(part, file, *, seconds):
        again.append(part.name)
        return stub(part, file)

    outcomes = measure(parts, tmp_path, silent, runner)
    assert again == ["wrong", "crashing"]
    assert [outcome.report is None for outcome in outcomes] == [True, True, False, True, False, True]


def test_combined_report_has_ratios_of_medians():
    one = combine([report("seqmix", 20.0, 40.0), report("llama", 30.0, 100.0)])
    assert [(row.length, row.name, row.ratio.median) for row in one.rows] == [
        (8192, "seqmix", 1.0),
        (8192, "llama", pytest.approx(1.5)),
        (16384, "seqmix", 1.0),
        (16384, "llama", pytest.approx(2.5)),
    ]
    assert one.rows[1].ratio.high == pytest.approx(3.0)
    assert combine([report("seqmix", 20.0)]).rows[0].ratio.median == 1.0


def fake_program(monkeypatch, code):
    monkeypatch.setattr(gpu, "PROGRAM", (sys.executable, "-c", code))
    return Part(group="op", name="op", command=("bench", "op"))


def test_process_receives_its_output_path(monkeypatch, tmp_path):
    part = fake_program(monkeypatch, "import sys; open(sys.argv[-1], 'w').write(' '.join(sys.argv[1:-1])); print(7)")
    assert run_process(part, tmp_path / "op.json", seconds=60) is None
    assert (tmp_path / "op.json").read_text() == "bench op --json"
    assert (tmp_path / "op.txt").read_text() == "7\n"


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("print('error: this is why'); raise SystemExit(2)", "exit status 2: error: this is why (full output: op.txt)"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9: it printed nothing (full output: op.txt)"),
        ("import time; time.sleep(60)", "stopped at its time limit of 1 s"),
    ],
)
def test_failed_process_reports_how_it_ended(code, problem, monkeypatch, tmp_path):
    part = fake_program(monkeypatch, code)
    assert run_process(part, tmp_path / "op.json", seconds=1) == problem


# ---- the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_command_fails_without_a_gpu(refused, tmp_path):
    assert "GPU" in refused("bench-gpu", "--out", "gpu")
    assert not (tmp_path / "gpu").exists()


def test_unknown_parts_are_rejected(refused):
    said = refused("bench-gpu", "--out", "gpu", "--only", "papertrain")
    assert re.search("there is no part 'papertrain'; .*did you mean \"paper-train\"", said)
