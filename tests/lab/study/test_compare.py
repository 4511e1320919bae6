"""`seqmix compare` end to end: real runs in separate processes, resumed after a kill, and the files it writes.

The parent is killed by SIGKILL, which no handler can catch, so its runs must notice by themselves that it is gone.
"""

import csv
import json
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import worker_processes
from small_runs import wait_for_steps

from seqmix.lab.figures.libraries import PlotsMissingError
from seqmix.lab.study import lock, runner
from seqmix.lab.study.lock import hold_lock
from seqmix.lab.study.plan import plan
from seqmix.lab.study.results_file import read_results
from seqmix.lab.study.run_results import is_finished
from seqmix.lab.study.runner import Observer, make_runs
from seqmix.lab.study.study import StudyError, load_study
from seqmix.lab.study.summary import timed_length
from seqmix.training import read_config, read_status
from seqmix.training.checkpoint.status import StatusWriter

BROKEN = """
entries:
  broken: {training: {learning_rate: 1.0e+30}, set: {model.blocks.ret.mixer: {kind: "loud:LoudConfig", n_heads: 2}}}
"""
LOUD = """
from typing import Literal
from seqmix.mixers.retention import RetentionConfig

class LoudConfig(RetentionConfig):
    kind: Literal["loud"] = "loud"


    def build(self, d_model, **position):
        print("null\\n[1]\\n", "x" * 100_000)  # JSON, and more than a pipe holds
        return super().build(d_model, **position)
"""
SPEED = "speed: {train: {lengths: [16], tokens: 32}, decode: {contexts: [8]}}\n"
PAPER = "paper: [{label: Perplexity, entry: retention, theirs: 26.05}]\n"


class Quiet(Observer):
    """Observer of a study that displays nothing and records notes, starts and problems."""

    def __init__(self):
        self.notes, self.begun, self.problems = [], [], {}
        super().__init__(self.notes.append)

    def started(self, run):
        self.begun.append(run.name)

    def ended(self, run, problem):
        self.problems[run.name] = problem


@pytest.fixture(scope="module")
def made(tmp_path_factory, small):
    """An uninterrupted study with one failing entry: its folder, exit status and printed output."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text("the text of a small run, over and over again. " * 60)
    (folder / "small.yaml").write_text(small + BROKEN + SPEED + PAPER)
    (folder / "loud.py").write_text(LOUD)
    status, printed = command(folder, "compare", "small.yaml", "--json", "result.json")
    return folder, status, printed


def command(folder: Path, *arguments: str) -> tuple[int, str]:
    """Run the command in a separate process and return its status and output."""
    process, output = start(folder, *arguments)
    process.join(300)
    return process.exitcode, output.read_text()


def start(folder: Path, *arguments: str):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["seqmix.cli.app", "seqmix.cli.commands.compare", "torch._dynamo"])
    output = folder / "printed.txt"
    process = context.Process(target=worker_processes.command_in, args=(str(folder), str(output), *arguments))
    process.start()
    return process, output


def losses(run: Path) -> list[tuple]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss"), line.get("validation_loss")) for line in lines]


def sessions(run: Path) -> list[int]:
    """The steps at which a run was started and resumed."""
    return [json.loads(line)["step"] for line in (run / "sessions.jsonl").read_text().splitlines()]


def test_results_record_entries_matches_and_run_status(made):
    root, status, printed = made
    assert status == 1
    assert "1 of 3 runs failed" in printed
    folder = root / "studies" / "small"
    found = read_results(folder)
    assert found == read_results(folder / "results.json")
    assert (found.name, found.question) == ("small", "Does it run?")
    assert found.machine.threads == 1
    by_name = {entry.name: entry for entry in found.entries}
    assert by_name["attention"].matched == ("parameters 11,344 by blocks.*.ffn.expansion = 4 (wanted 11,344; exact)")
    assert by_name["retention"].matched is None
    assert (by_name["attention"].state_grows, by_name["retention"].state_grows) == (True, False)
    runs = {run.name: run for run in found.runs}
    assert {name: run.status for name, run in runs.items()} == {
        "retention-seed0": "finished",
        "attention-seed0": "finished",
        "broken-seed0": "failed",
    }
    assert "the loss is nan" in runs["broken-seed0"].error
    assert "[1]" in (folder / "logs" / "broken-seed0.txt").read_text()  # what the plug-in prints
    run = runs["retention-seed0"]
    assert [point.step for point in run.history] == list(range(1, 121))
    assert [point.step for point in run.evaluations] == [40, 80, 120]
    assert run.history[-1].tokens == 120 * 2 * 16
    assert run.history[-1].flops == 3 * by_name["retention"].flops_per_token * 120 * 2 * 16
    assert run.history[-1].seconds == pytest.approx(run.seconds)
    assert [(point.step, point.loss, None) for point in run.history] == [
        line for line in losses(folder / "runs" / run.name) if line[1] is not None
    ]
    assert run.validation_loss == run.evaluations[-1].validation_loss
    summary = {row.entry: row for row in found.summary}
    assert set(summary) == {"retention", "attention"}
    assert summary["retention"].validation_loss.mean == run.validation_loss
    assert summary["retention"].validation_loss.spread is None
    assert [(row.entry, row.length) for row in found.speed.train] == [(name, 16) for name in by_name]
    assert all(row.tokens_per_second > 0 for row in found.speed.train)
    # one throughput: the timed one is in the summary, its table and the command's result
    timed = {row.entry: row.tokens_per_second for row in found.speed.train if row.length == timed_length(found)}
    result = json.loads((root / "result.json").read_text())
    for rows in (found.model_dump()["summary"], result["summary"]):
        assert {row["entry"]: row["tokens_per_second"] for row in rows}.items() <= timed.items()
    assert result["speed"] in result["notes"]
    assert all(row.seconds > 0 and row.state_bytes > 0 for row in found.speed.decode)
    (figure,) = found.paper
    assert (figure.theirs, round(figure.ours, 6)) == (26.05, round(2.718281828459045**run.validation_loss, 6))
    rows = csv.DictReader((folder / "runs.csv").open())
    assert [row["status"] for row in rows] == ["finished", "finished", "failed"]
    assert "- broken-seed0 failed: step 2: the loss is nan" in (folder / "summary.md").read_text()


@pytest.mark.slow
def test_result_has_the_difference_of_each_entry_from_the_subject(made):
    root, _, _ = made
    result = json.loads((root / "result.json").read_text())
    loss = {row["entry"]: row["validation_loss"]["mean"] for row in result["summary"]}
    (attention,) = result["comparisons"]
    assert (result["subject"], attention["entry"]) == ("retention", "attention")
    assert attention["measure"] == "validation_loss"
    assert attention["difference"] == pytest.approx(loss["attention"] - loss["retention"])
    assert attention["verdict"] is None  # one seed


def test_rates_are_tuned_before_the_seeds_are_trained(made, tmp_path, small):
    (tmp_path / "text.txt").write_text((made[0] / "text.txt").read_text())
    tune = "tune: {learning_rate: [1.0e-3, 1.0e+30], seeds: [7]}\n"
    text = small.replace("[retention, attention]", "[retention]").replace("steps: 120", "steps: 4")
    (tmp_path / "small.yaml").write_text(text + tune + "seeds: [0, 1]\nsubject: retention\n")
    status, printed = command(tmp_path, "compare", "small.yaml", "--jobs", "1")
    assert status == 1
    folder = tmp_path / "studies" / "small"
    found = read_results(folder)
    runs = {run.name: run for run in found.runs}
    assert {name: (run.tunes, run.status, run.learning_rate) for name, run in runs.items()} == {
        "retention-lr0.001-seed7": (True, "finished", 1e-3),
        "retention-lr1e+30-seed7": (True, "failed", 1e30),
        "retention-seed0": (False, "finished", 1e-3),
        "retention-seed1": (False, "finished", 1e-3),
    }
    (row,) = found.summary
    assert (row.seeds, row.learning_rate, row.at_edge) == (2, 1e-3, "lowest")
    assert row.validation_loss.mean == pytest.approx(
        (runs["retention-seed0"].validation_loss + runs["retention-seed1"].validation_loss) / 2
    )
    assert "the best learning rate, 0.001, is the lowest that was tried" in printed
    assert {run.precision for run in found.runs if run.status == "finished"} == {found.machine.precision}
    # a run that is reported is trained again if another rate is chosen
    (tmp_path / "small.yaml").write_text(text + tune.replace("1.0e+30", "2.0e-3") + "seeds: [0]\n")
    metrics = folder / "runs" / "retention-lr0.001-seed7" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    worse = [line | {"validation_loss": 99.0} if "validation_loss" in line else line for line in lines]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in worse))
    status, printed = command(tmp_path, "compare", "small.yaml", "--jobs", "1")
    assert status == 0
    assert "retention-seed0 has a different configuration than before and is trained again" in printed
    assert [run.learning_rate for run in read_results(folder).runs if not run.tunes] == [2e-3]


def test_results_are_written_without_plotting_libraries(made, tmp_path, monkeypatch):
    def missing(*arguments):
        raise PlotsMissingError

    monkeypatch.chdir(made[0])
    monkeypatch.syspath_prepend(made[0])  # where loud.py is
    monkeypatch.setattr(runner, "write_report", missing)
    (tmp_path / "report.html").write_text("of other results")
    runner._write(plan(load_study(Path("small.yaml")), Path("small.yaml")), tmp_path, {})
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "runs.csv", "summary.csv", "summary.md"}


def test_finished_runs_are_not_repeated(made, monkeypatch):
    folder, *_ = made
    before = {file: file.stat().st_mtime_ns for file in (folder / "studies").rglob("*.safetensors")}
    assert before
    monkeypatch.chdir(folder)
    planned = plan(load_study(Path("small.yaml")), Path("small.yaml"))
    for program, status in (("false", 1), ("true", 0)):  # nothing that begins can work, whatever its status is
        monkeypatch.setattr(runner, "PROGRAM", (program,))
        shown = Quiet()
        done = make_runs(planned, Path("studies/small"), jobs=1, observer=shown)
        assert shown.begun == ["broken-seed0"]
        assert f"exit status {status}" in done.failed["broken-seed0"]
    assert {file: file.stat().st_mtime_ns for file in (folder / "studies").rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("damaged", "why"),
    [
        (None, "has a different configuration than before"),
        ("metrics.jsonl", "lacks measurements in metrics.jsonl"),
        ("checkpoints/*/model.safetensors", "has no intact checkpoint"),
    ],
)
def test_unresumable_run_is_moved_aside(made, tmp_path, monkeypatch, damaged, why):
    monkeypatch.chdir(made[0])
    monkeypatch.syspath_prepend(made[0])  # where loud.py is
    study = load_study(Path("small.yaml"))
    if damaged is None:
        study = study.model_copy(update={"training": {**study.training, "warmup_steps": 3}})
    run = plan(study, Path("small.yaml")).runs[0]
    place, shown = shutil.copytree(Path("studies/small/runs", run.name), tmp_path / run.name), Quiet()
    if damaged is not None:
        for file in (place / "metrics.jsonl", *place.glob(damaged)):
            file.write_bytes(b"")
    assert not is_finished(run, place)
    runner._clear(run, place, shown)
    aside = place.with_name(f"{run.name}.before-1")
    assert not place.exists()
    assert read_config(aside).training.warmup_steps == 1
    assert shown.notes == [f"{run.name} {why} and is trained again; the old run is now {aside}"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_stopped_and_killed_study_resumes_to_the_same_results(made, tmp_path, small):
    (tmp_path / "text.txt").write_text((made[0] / "text.txt").read_text())
    (tmp_path / "small.yaml").write_text(small)
    moments, folder = random.Random(0), tmp_path / "studies" / "small"
    for number, name in ((signal.SIGTERM, "retention-seed0"), (signal.SIGKILL, "attention-seed0")):
        process, output = start(tmp_path, "compare", "small.yaml", "--jobs", "1")
        wanted, run = moments.randrange(60), folder / "runs" / name
        wait_for_steps(run, wanted + 1, process.is_alive)
        assert process.is_alive(), output.read_text()
        os.kill(process.pid, number)
        process.join(300)
        if number == signal.SIGTERM:
            assert process.exitcode == 130
            assert "with: seqmix compare small.yaml" in output.read_text()
            assert [run.status for run in read_results(folder).runs] == ["missing", "missing"]
        else:
            assert process.exitcode == -signal.SIGKILL
        with hold_lock(folder, print):  # its runs have ended
            assert wanted < losses(run)[-1][0] < 120
    status, printed = command(tmp_path, "compare", "small.yaml")
    assert status == 0
    assert "1 of 2 runs are finished already" in printed
    for name in ("retention-seed0", "attention-seed0"):
        assert losses(folder / "runs" / name) == losses(made[0] / "studies" / "small" / "runs" / name)
        # nothing was made twice: it went on where it had stopped
        began, went_on = sessions(folder / "runs" / name)
        assert began == 0 < went_on


def test_study_folder_is_locked_to_one_process(tmp_path):
    says = f"another process .*{os.getpid()}.* is running"
    with hold_lock(tmp_path, print), pytest.raises(StudyError, match=says), hold_lock(tmp_path, print):
        pass
    with hold_lock(tmp_path, print):
        pass


def test_lock_waits_for_runs_of_a_dead_process(tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    with (tmp_path / "study.lock").open("w") as file:
        file.write("999999999\n")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        shown = Quiet()
        with (
            pytest.raises(StudyError, match="runs of an earlier process are still writing"),
            hold_lock(tmp_path, shown.note),
        ):
            pass
        assert shown.notes == ["waiting for runs of an earlier process to write their checkpoints"]
    with hold_lock(tmp_path, shown.note):
        pass


def test_missing_study_and_unwritable_output_are_rejected(seqmix, refused, small):
    assert refused("compare").startswith("compare needs a STUDY")
    assert "recall" in seqmix("compare", "--list").out
    Path("file").write_text("")
    Path("small.yaml").write_text(small)
    taken = refused("compare", "small.yaml", "--out", "file", status=3)
    assert taken.startswith("a study cannot be written to file")


def test_status_is_running_while_folder_is_locked(tmp_path):
    with hold_lock(tmp_path, print):
        StatusWriter(tmp_path, 3, lists_failures=True).begin(0)
        assert read_status(tmp_path).state == "running"
    assert read_status(tmp_path).state == "killed"


def test_time_budget_stops_study_and_reports_it(seqmix, small):
    Path("small.yaml").write_text(small)
    done = seqmix("compare", "small.yaml", "--out", "study", "--budget", "0.000001", "--json", "-")
    result = json.loads(done.out)
    assert (done.status, result["state"], result["finished"]) == (0, "stopped", 0)
    assert "resume with: seqmix compare small.yaml --out study" in done.err
    status = read_status("study")
    assert (status.state, status.step, status.steps, status.failed) == ("stopped", 0, result["runs"], {})
    assert "time budget" in status.reason
