"""The status.json of a run: how it ended, time budgets, and killed runs."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partial

import pytest
from abuse.tally import Case, fault_of
from conftest import SMALL
from json_mutations import mutated_json
from small_runs import checkpoint_bytes, metrics, run_of, stopped, wait_for_steps

from seqmix import DataError, SeqmixError, train
from seqmix.cli.commands.status import status as show_status
from seqmix.registry import format_duration, parse_duration
from seqmix.training import read_status
from seqmix.training.monitoring.events import OutOfTime, Stepped


def test_finished_run_has_status_finished(config_of, tmp_path):
    run_of(config_of(), tmp_path / "run")
    status = read_status(tmp_path / "run")
    assert (status.state, status.step, status.steps, status.pid) == ("finished", 6, 6, None)
    final = [line["validation_loss"] for line in metrics(tmp_path / "run") if line.get("final")]
    assert [status.validation_loss] == final
    assert json.loads((tmp_path / "run" / "status.json").read_text())["reason"] == "all steps are made"


def test_run_in_progress_has_status_running_and_the_pid_of_its_process(config_of, tmp_path):
    events = train(config_of(), tmp_path / "run")
    next(event for event in events if isinstance(event, Stepped))
    status = read_status(tmp_path / "run")
    assert (status.state, status.pid) == ("running", os.getpid())
    events.close()
    assert read_status(tmp_path / "run").state == "interrupted"


def test_run_stopped_on_request_has_status_interrupted(config_of, tmp_path):
    stopped(config_of(), tmp_path / "run", 3)
    assert (read_status(tmp_path / "run").state, read_status(tmp_path / "run").step) == ("interrupted", 3)


def test_run_that_stops_early_has_status_finished(config_of, tmp_path):
    run_of(config_of("training.patience=1", "training.learning_rate=1.0e-12", "training.steps=12"), tmp_path / "run")
    status = read_status(tmp_path / "run")
    assert status.state == "finished"
    assert "stopped early" in status.reason


def test_diverged_run_records_the_error_as_reason(config_of, tmp_path):
    with pytest.raises(SeqmixError) as raised:
        run_of(config_of("training.learning_rate=1.0e+30", "training.warmup_steps=0"), tmp_path / "run")
    assert raised.value.exit_status == 4
    status = read_status(tmp_path / "run")
    assert (status.state, status.reason) == ("diverged", str(raised.value))


def test_failure_in_the_loop_is_recorded(config_of, tmp_path):
    events = train(config_of(), tmp_path / "run")
    next(events)
    with pytest.raises(RuntimeError):
        events.throw(RuntimeError("a bug"))
    assert (read_status(tmp_path / "run").state, read_status(tmp_path / "run").reason) == (
        "failed",
        "RuntimeError: a bug",
    )


class UnprintableError(Exception):
    def __str__(self):
        raise ZeroDivisionError

    __repr__ = __str__


@pytest.mark.parametrize("error", [UnprintableError(), SystemExit(UnprintableError()), SeqmixError(UnprintableError())])
def test_error_with_unprintable_message_is_recorded(config_of, tmp_path, error):
    events = train(config_of(), tmp_path / "run")
    next(events)
    with pytest.raises(type(error)):
        events.throw(error)
    status = read_status(tmp_path / "run")
    assert status.state == "failed"
    assert "message cannot be shown" in status.reason


def test_killed_run_is_recognised_and_resumes(config_of, seqmix, tmp_path):
    command = [sys.executable, "-c", "from seqmix.cli.app import main; main()", "train", "retnet-tiny", *SMALL]
    command += ["data.paths=[text.txt]", "training.steps=1000000", "--out", "run"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for_steps(tmp_path / "run", 4, lambda: process.poll() is None)
        assert read_status("run").pid == process.pid
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    status = read_status("run")
    assert status.state == "killed"
    assert str(process.pid) in status.reason
    assert seqmix("train", "--resume", "run", "--budget", "0.001").status == 0
    assert read_status("run").state == "stopped"


def test_unlocked_run_is_not_running_even_if_its_process_lives(config_of, tmp_path):
    events = train(config_of(), tmp_path / "run")
    next(event for event in events if isinstance(event, Stepped))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")  # as a killed run leaves it; the process is alive
    (tmp_path / "run" / "run.lock").unlink()  # the folder is locked too
    assert read_status(tmp_path / "run").state == "running"
    assert read_status(tmp_path / "copy").state == "killed"
    (tmp_path / "copy" / "run.lock").unlink()
    assert read_status(tmp_path / "copy").state == "killed"
    events.close()


@pytest.mark.parametrize("has_locks", [True, False])
def test_unreaped_process_is_reported_killed_only_if_locks_exist(config_of, tmp_path, monkeypatch, has_locks):
    run_of(config_of("training.steps=1"), tmp_path / "run")
    file = tmp_path / "run" / "status.json"
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"state": "running", "pid": process.pid}))
    if not has_locks:
        monkeypatch.setitem(sys.modules, "fcntl", None)
    # without locks there is only the process ID
    assert read_status(tmp_path / "run").state == ("killed" if has_locks else "running")
    process.wait()
    assert read_status(tmp_path / "run").state == "killed"


def test_run_stopped_by_its_time_budget_resumes_bitwise(config_of, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_of(config_of(), whole)
    events = run_of(config_of("training.max_time=0.001"), parts)
    assert isinstance(events[-1], OutOfTime)
    status = read_status(parts)
    assert (status.state, status.step) == ("stopped", 1)
    assert "0.001s" in status.reason
    assert status.validation_loss is not None
    run_of(config_of(), parts, resume=True)
    assert checkpoint_bytes(parts) == checkpoint_bytes(whole)


def test_missing_or_damaged_status_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no status\.json"):
        read_status(tmp_path)
    for text in ("{", "[]", "{}"):
        (tmp_path / "status.json").write_text(text)
        with pytest.raises(DataError, match="damaged"):
            read_status(tmp_path)


def test_damaged_status_error_names_the_field(config_of, tmp_path):
    run_of(config_of(), tmp_path / "run")
    file = tmp_path / "run" / "status.json"
    good = json.loads(file.read_text())
    for field, value in {"step": "6", "loss": [1.0], "state": "resting", "failed": {"a": 1}}.items():
        file.write_text(json.dumps(good | {field: value}))
        with pytest.raises(DataError, match=rf"status\.json is damaged: .* \({field}: "):
            read_status(tmp_path / "run")
    file.write_text(json.dumps(good | {"a_later_field": 1}))
    assert read_status(tmp_path / "run").step == 6


def test_mutated_status_is_shown_or_refused_in_one_line(config_of, tmp_path, monkeypatch):
    """The mutations are seeded; the output contains no terminal control characters."""

    class Screen(io.StringIO):
        def isatty(self):
            return True

    run_of(config_of(), tmp_path / "run")
    file = tmp_path / "run" / "status.json"
    good = json.loads(file.read_text()) | {"failed": {"a": "a reason"}}
    monkeypatch.setenv("TERM", "dumb")

    def show(content: bytes) -> None:
        file.write_bytes(content)
        with redirect_stdout(Screen()) as screen:
            show_status([tmp_path / "run"])
        assert screen.getvalue().replace("\n", "").isprintable()

    cases = [Case(name, partial(show, content), refused=False) for name, content in mutated_json(good, 0, 200)]
    assert [(case.name, fault) for case in cases if (fault := fault_of(case))] == []


def test_durations_are_parsed_and_formatted():
    texts = ("90s", "30m", "1h30m", "0.5h", "90", 90, 2.5)
    assert [parse_duration(text) for text in texts] == [90, 1800, 5400, 1800, 90, 90, 2.5]
    assert [format_duration(seconds) for seconds in (90, 1800, 5400, 2.5)] == ["1m30s", "30m", "1h30m", "2.5s"]
    for wrong in ("", "m30", "30m5", "1m1h", "0", "-3", "inf", "nan", True, 0):
        with pytest.raises(SeqmixError, match="expected a duration such as 90s"):
            parse_duration(wrong)
