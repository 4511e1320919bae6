"""Every command whose output nobody reads, or that cannot be written: what it was asked for is written nonetheless.

It ends with 0, or with 141 as a process does that writes to a closed pipe; where the output is a full disk, with one
sentence. Nothing ends in a traceback or a signal.
"""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from abuse.commands import commands, environment, prepared
from abuse.tally import Case

SPOKEN = {
    "show": ["show", "retnet-tiny"],
    "mixers": ["mixers"],
    "generate": ["generate", "run", "--prompt", "a", "--max-new-tokens", "3000", "--no-compile"],
    "dry-run": ["compare", "study.yaml", "--dry-run"],
    "evaluate-alone": ["evaluate", "run", "--length", "16", "--tokens", "16"],
    "help": ["train", "--help"],
}
"""Commands that only say something."""


def _gone() -> int:
    reads, writes = os.pipe()
    os.close(reads)
    return writes


OUTPUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "a reader that is gone": lambda: {"stdout": _gone()},
    "a reader of one line": lambda: {"stdout": subprocess.PIPE},
    "a full disk": lambda: {"stdout": os.open("/dev/full", os.O_WRONLY)},
    "no output": lambda: {"preexec_fn": lambda: os.close(1)},
    "no output and no errors": lambda: {"stderr": None, "preexec_fn": lambda: [os.close(1), os.close(2)]},
    "errors that nobody reads either": lambda: {"stdout": (gone := _gone()), "stderr": gone},
}


def outputs(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Every command, with every output."""
    base = prepared(folder)
    wanted: dict[str, set[str]] = {}
    for name, arguments in (commands() | SPOKEN).items():
        for output in OUTPUTS:
            where = folder / f"{name}-{output.replace(' ', '-')}"
            yield Case(
                f"{name} with {output}", partial(_try, base, where, name, arguments, output, wanted), refused=False
            )


def _try(base: Path, where: Path, name: str, arguments: list[str], output: str, wanted: dict[str, set[str]]) -> None:
    if name not in wanted:
        read = where.with_suffix(".read")
        shutil.copytree(base, read)
        _run(read, arguments, {"stdout": subprocess.PIPE}, whole=True)
        wanted[name] = _files(read)
    shutil.copytree(base, where)
    status, errors = _run(where, arguments, OUTPUTS[output]())
    assert "Traceback" not in errors, errors.splitlines()[-1]
    assert status >= 0, f"signal {-status}: {errors[-200:]}"
    lost = wanted[name] - _files(where)
    assert not lost, f"not written: {sorted(lost)[:3]}, status {status}: {errors[-200:]}"
    if output == "a full disk" and status:
        assert status in (1, 3), f"status {status}"
        assert errors.splitlines()[-1].startswith("error: "), errors[-200:]
    else:
        assert status in (0, 141), f"status {status}: {errors[-300:]}"


def _run(where: Path, arguments: list[str], how: dict[str, Any], *, whole: bool = False) -> tuple[int, str]:
    command = [sys.executable, "-m", "seqmix", *arguments]
    settings = {"stderr": subprocess.PIPE, "cwd": where, "env": environment(), "text": True} | how
    running = subprocess.Popen(command, **settings)
    for handle in {value for value in how.values() if isinstance(value, int) and value >= 0}:
        os.close(handle)
    if running.stdout is not None and not whole:
        running.stdout.readline()
        running.stdout.close()
        running.stdout = None
    try:
        _, errors = running.communicate(timeout=200)
    finally:
        running.kill()
    return running.returncode, errors or ""


def _files(folder: Path) -> set[str]:
    """Of what it holds; not locks, and not what a killed worker's log may lack."""
    found = (file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock")
    return {str(file.relative_to(folder)) for file in found}
