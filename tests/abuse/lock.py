"""A second command on a run that trains, whatever was done to its files: one trains, the other ends with one sentence,
and steps go forward.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr
from functools import partial
from io import StringIO
from multiprocessing.process import BaseProcess as Process
from pathlib import Path
from unittest.mock import patch

import worker_processes
from abuse.commands import SMALL
from abuse.tally import Case

from seqmix.cli.app import main

PROCESSES = multiprocessing.get_context("forkserver")
"""Forked from one that has imported torch."""
PROCESSES.set_forkserver_preload(["seqmix.cli.app", "seqmix.cli.progress", "torch._dynamo"])
NEW = ["train", "retnet-tiny", *SMALL, "training.steps=1000000", "training.keep_checkpoints=2", "--out"]


def _renamed(file: Path) -> None:
    """As editors save, and sed -i: another file takes the name."""
    (other := file.with_name(f"{file.name}.new")).write_bytes(file.read_bytes())
    other.replace(file)


def _without(file: Path) -> Path:
    """The name of what is removed."""
    file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
    return file


DONE: dict[str, Callable[[Path], object]] = {
    "nothing": lambda run: None,
    "config.yaml edited in its place": lambda run: (run / "config.yaml").open("a").write("\n"),
    "config.yaml edited by rename": lambda run: _renamed(run / "config.yaml"),
    "the lock renamed": lambda run: _renamed(_without(run / "run.lock").open("x") and run / "run.lock"),
    "the lock a link": lambda run: _without(run / "run.lock").symlink_to("elsewhere"),
    "the lock a folder": lambda run: _without(run / "run.lock").mkdir(),
    "the lock removed": lambda run: _without(run / "run.lock"),
    "sessions.jsonl removed": lambda run: _without(run / "sessions.jsonl"),
    "the process stopped": lambda run: None,
}
"""What somebody does to a run while it trains."""
PLACES = ("run", "./run/", "link", "above/run", "inside/../run", "{folder}/run", "/proc/self/cwd/run")


def lock(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """A second `--resume`, or another start, by every path to the folder; and two at once."""
    (folder / "text.txt").write_text("the text of a small run, over and over again. " * 60)
    (folder / "link").symlink_to("run")
    (folder / "above").symlink_to(folder)
    (folder / "inside").mkdir()
    trained: list[Process] = []
    for what, change in DONE.items():
        for place in drawn.sample(PLACES, 2):
            again = partial(_second, folder, trained, what, change, ["train", "--resume", place.format(folder=folder)])
            yield Case(f"{what}, then --resume {place}", again, refused=False)
        new = partial(_second, folder, trained, what, change, [*NEW, "run"])
        yield Case(f"{what}, then a start", new, refused=False)
    yield Case("a copy of a run that trains", partial(_copied, folder, trained), refused=False)
    for first in ("was stopped", "was killed", "is not there"):
        yield Case(f"two at once where a run {first}", partial(_at_once, folder, first), refused=False)


def _begin(folder: Path, *arguments: str) -> Process:
    process = PROCESSES.Process(target=_command, args=(folder, *arguments), daemon=True)
    process.start()
    return process


def _command(folder: Path, *arguments: str) -> None:
    """In a process of its own, whose errors are in a file."""
    os.chdir(folder)
    os.dup2(os.open(f"{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT), 2)
    worker_processes.command(*arguments)


def _errors(folder: Path, process: Process) -> str:
    return (folder / f"{process.pid}.txt").read_text()


def _steps(run: Path) -> list[int]:
    """Steps measured so far."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n") and '"loss"' in line]


def _wait(run: Path, process: Process, more: int) -> None:
    """Until it has trained some steps, which go forward."""
    end, before = time.monotonic() + 300, len(_steps(run))
    while len(steps := _steps(run)[max(before - 20, 0) :]) < min(before, 20) + more:
        assert process.is_alive(), f"status {process.exitcode}: {_errors(run.parent, process)[-300:]}"
        assert time.monotonic() < end, "it does not train"
        time.sleep(0.1)
    assert steps == list(range(steps[0], steps[0] + len(steps))), f"steps go back: {steps}"


def _require_one(status: int | None, errors: str) -> None:
    assert (status, errors.count("\n"), errors[:7]) == (2, 1, "error: "), f"status {status}: {errors[-300:]}"


def _trained(folder: Path, trained: list[Process]) -> Process:
    """The run that trains, from the first time that somebody asks."""
    if not trained:
        trained.append(_begin(folder, *NEW, "run"))
    _wait(folder / "run", trained[0], 2)
    return trained[0]


def _second(
    folder: Path, trained: list[Process], what: str, change: Callable[[Path], object], words: list[str]
) -> None:
    process, run, errors, status = _trained(folder, trained), folder / "run", StringIO(), None
    change(run)
    if stopped := what == "the process stopped":
        os.kill(process.pid or 0, signal.SIGSTOP)
    try:
        with chdir(folder), patch.object(sys, "argv", ["seqmix", *words]), redirect_stderr(errors):
            main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    finally:
        if stopped:
            os.kill(process.pid or 0, signal.SIGCONT)
    _require_one(status, errors.getvalue())
    _wait(run, process, 2)


def _stop(process: Process) -> None:
    process.terminate()
    process.join(300)
    assert process.exitcode in (0, 130), f"status {process.exitcode}"


def _copied(folder: Path, trained: list[Process]) -> None:
    """A copy is another run: both train."""
    process, copy = _trained(folder, trained), folder / "copy"
    _stop(process)
    shutil.copytree(folder / "run", copy)
    both = [(run, _begin(folder, "train", "--resume", run.name)) for run in (folder / "run", copy)]
    for run, each in both:
        _wait(run, each, 2)
    for _, each in both:
        _stop(each)


def _at_once(folder: Path, first: str) -> None:
    """Of two that start at once one trains."""
    run = folder / f"once {first}"
    if first != "is not there":
        before = _begin(folder, *NEW, run.name)
        _wait(run, before, 3)
        before.kill() if first == "was killed" else _stop(before)
        before.join()
    arguments = [*NEW, run.name] if first == "is not there" else ["train", "--resume", run.name]
    both = [_begin(folder, *arguments) for _ in range(2)]
    try:
        end = time.monotonic() + 300
        while (ended := next((each for each in both if not each.is_alive()), None)) is None:
            assert time.monotonic() < end, "both train"
            time.sleep(0.1)
        _require_one(ended.exitcode, _errors(folder, ended))
        (other,) = (each for each in both if each is not ended)
        _wait(run, other, 2)
        _stop(other)
    finally:
        for each in both:
            each.kill()
