"""Every command that writes, on a disk that fills up: a sentence, a status other than 0, no empty file, nothing lost.

The disk is a function: `os.write` cannot be patched below libraries, so a limit on the size of a file (RLIMIT_FSIZE)
stands for it, which every way of writing meets; the signal that comes with it is ignored, as on a full disk.
"""

import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from abuse.commands import commands, environment, prepared
from abuse.tally import Case

SIZES = (0, 400, 40_000, None)
"""Bytes that a file may have: nothing, a part of a small one, a part of a large one, all."""

WHOLE = {"tokenize", "tokenizer", "export", "average", "convert", "convert-as", "export-hf", "inspect"}
"""Commands that write all or nothing."""


def full_disk(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Every command, with every size of what fits."""
    base = prepared(folder)
    for name, arguments in commands().items():
        for size in SIZES:
            where = folder / f"{name}-{size}"
            yield Case(
                f"{name} with {'all' if size is None else size} bytes",
                partial(_try, base, where, name, arguments, size),
                refused=False,
            )


def _try(base: Path, where: Path, name: str, arguments: list[str], size: int | None) -> None:
    shutil.copytree(base, where)
    before = {file: file.read_bytes() for file in where.rglob("*") if file.is_file() and file.suffix != ".lock"}
    done = _call(where, arguments, size)
    made = [file for file in where.rglob("*") if file.is_file() and file not in before]
    if done.returncode == 0:
        assert size != 0, f"status 0: {done.stdout} {done.stderr}"
        return
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert "Traceback" not in done.stderr, done.stderr.splitlines()[-1]
    assert done.returncode in (1, 3), f"status {done.returncode}: {done.stderr[-200:]}"
    assert errors, f"no error: {done.stderr[-200:]!r}"
    left = [str(file.relative_to(where)) for file in made if file.suffix != ".lock"]
    assert name not in WHOLE or not left, f"left: {left}"
    # a log of nothing said is empty, and so is a lock
    empty = [
        file for file in made if file.stat().st_size == 0 and file.suffix != ".lock" and file.parent.name != "logs"
    ]
    assert not empty, f"empty: {[str(file.relative_to(where)) for file in empty]}"
    partial_ones = [file for file in made if ".partial" in file.name]
    assert not partial_ones, f"left: {[str(file.relative_to(where)) for file in partial_ones]}"
    lost = [file for file, content in before.items() if not file.exists() or not file.read_bytes().startswith(content)]
    assert not lost, f"lost: {[str(file.relative_to(where)) for file in lost]}"


def _call(where: Path, arguments: list[str], size: int | None) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return subprocess.run(
        [sys.executable, "-m", "seqmix", *arguments],
        cwd=where,
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env=environment(),
        timeout=200,
        check=size is None,
    )
