"""Every command that writes, on a disk that fills up: a sentence, a status other than 0, no empty file, nothing lost.

The disk is a function: `os.write` cannot be patched below libraries, so a limit on the size of a file (RLIMIT_FSIZE)
stands for it, which every way of writing meets; the signal that comes with it is ignored, as on a full disk.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from abuse.tally import Case

SMALL = (
    *("model.d_model=16", "model.n_layers=1", "data.sequence_length=16", "training.steps=2", "training.batch_size=2"),
    *("training.evaluation_batches=1", "training.final_evaluation_batches=1", "training.checkpoint_every=1"),
    *("training.log_every=1", "data.paths=[text.txt]"),
)
TINY = ("retnet-tiny", "model.d_model=16", "model.n_layers=1", "--length", "16", "--tokens", "16")
LLAMA = (
    "model={norm: {kind: rmsnorm}, blocks: {attn: {mixer: {kind: attention, n_heads: 4, positions: rope}, "
    "ffn: {kind: swiglu, expansion: 2.0}, norm: {kind: rmsnorm}}}}"
)
"""A model that transformers has too."""
SIZES = (0, 400, 40_000, None)
"""Bytes that a file may have: nothing, a part of a small one, a part of a large one, all."""
STUDY = """
base: retnet-tiny
mixers: [retention]
model: {d_model: 16, n_layers: 1}
data: {sequence_length: 16, paths: [text.txt]}
training: {steps: 2, batch_size: 2, evaluation_batches: 1, final_evaluation_batches: 1, log_every: 1}
"""


def commands() -> dict[str, list[str]]:
    """Command lines by what they write; they run beside text.txt, a run, a token file and a study's file."""
    return {
        "train": ["train", "retnet-tiny", *SMALL, "--out", "new"],
        "resume": ["train", "--resume", "run"],
        "tokenize": ["tokenize", "text.txt", "--out", "new.tokens"],
        "tokenizer": ["tokenize", "text.txt", "--train-bpe", "300", "--out", "new.tokens"],
        "save-state": ["generate", "run", "--prompt", "a", "--max-new-tokens", "2", "--save-state", "new.state"],
        "evaluate": ["evaluate", "run", "--length", "16", "--tokens", "16", "--json", "new.json"],
        "plot": ["plot", "run", "--out", "new.html"],
        "plot-png": ["plot", "run", "--figure", "loss", "--out", "new.png"],
        "export": ["export", "run", "--out", "new.safetensors"],
        "average": ["average", "run", "--to", "new"],
        "compare": ["compare", "study.yaml", "--out", "new"],
        "bench": ["bench", "train", *TINY, "--only", "seqmix", "--json", "new.json", "--markdown", "new.md"],
        "convert": ["convert", "theirs", "--tokenizer", "bytes", "--to", "new"],
        "convert-as": ["convert", "llama", "--as", "llama", "--to", "new"],
        "export-hf": ["export", "llama", "--to", "hf", "new"],
        "inspect": ["inspect", "llama", "--text", "text.txt", "--out", "new.html", "--json", "new.json"],
        "check": ["check", "min_gru", "--quick", "--compile", "none", "--json", "new.json", "--junit", "new.xml"],
    }


def full_disk(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Every command, with every size of what fits."""
    base = folder / "base"
    base.mkdir()
    (base / "text.txt").write_text("the text of a small run, over and over again. " * 60)
    (base / "study.yaml").write_text(STUDY)
    _call(base, ["train", "retnet-tiny", *SMALL, "--out", "run"], None)
    config = base / "run" / "config.yaml"  # which may be edited: it is not done yet
    config.write_text(config.read_text().replace("  steps: 2\n", "  steps: 3\n"))
    _call(base, ["train", "attention-tiny", *SMALL, LLAMA, "--out", "llama"], None)
    _call(base, ["convert", "llama", "--as", "llama", "--to", "theirs"], None)
    for name, arguments in commands().items():
        if "hf" in arguments and find_spec("transformers") is None:
            continue
        for size in SIZES:
            where = folder / f"{name}-{size}"
            yield Case(
                f"{name} with {'all' if size is None else size} bytes",
                partial(_try, base, where, arguments, size),
                refused=False,
            )


def _try(base: Path, where: Path, arguments: list[str], size: int | None) -> None:
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
    assert done.returncode in (1, 2), f"status {done.returncode}: {done.stderr[-200:]}"
    assert errors, f"no error: {done.stderr[-200:]!r}"
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
        env=os.environ | {"COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=200,
        check=size is None,
    )
