"""Runs of one, two and four processes, eager and compiled, that are killed 20 times each: the bits of the one that was
not; and a run that goes from four processes to one, to two and on, killed everywhere: every sample once.

After every kill the newest checkpoint is that of the uninterrupted run; at the end all measurements are.
"""

import json
import random
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import rank_processes as on_ranks
import torch
import worker_processes
from abuse.lock import PROCESSES
from abuse.tally import Case
from safetensors.torch import load_file
from small_runs import metrics, steps_of, wait_for_steps

from seqmix import load_run
from seqmix.training.checkpoint.files import checkpoints, find, step_of

KILLS, STEPS = 20, 60
CHANGES = (
    *("hybrid-tiny", *on_ranks.SMALL, f"training.steps={STEPS}", "training.checkpoint_every=2", "model.dropout=0.1"),
    *("training.keep_checkpoints=1000", "training.evaluate_every=20", "training.carry_state=true"),
    "model.blocks.attn.mixer={kind: delta_net, n_heads: 2}",
)
LAYOUTS = {1: (), 2: ("distributed.context_parallel=2",), 4: ("distributed.data=2",)}
# without feed-forward networks, for fewer kernels to build
MODES = {"eager": (), "compiled": ("training.compile=true", "model.blocks.ret.ffn=null", "model.blocks.attn.ffn=null")}
PLAIN = "training.optimizer=torch.optim:SGD"
"""What moves weights in proportion to their gradients: rounding stays rounding."""


def kills(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Each kill is a case, and each end."""
    numbers = (str(drawn.randrange(10**6)) for _ in range(900))  # no two sequences are alike
    (folder / "text.txt").write_text(" ".join(numbers))
    for mode, changes in MODES.items():
        for size, layout in LAYOUTS.items():
            run = folder / f"{mode} on {size}"
            sizes, asked = [size] * KILLS, [*CHANGES, *changes, *layout]
            yield from _killed(folder, drawn, run, sizes, asked)
    sizes = [(4, 1, 2)[number % 3] for number in range(KILLS)]
    yield from _killed(folder, drawn, folder / "4 to 1 to 2", sizes, [*CHANGES, PLAIN])


def _killed(folder: Path, drawn: random.Random, run: Path, sizes: list[int], changes: list[str]) -> Iterator[Case]:
    changes = [*changes, f"data.paths=[{folder / 'text.txt'}]"]
    for number, size in enumerate(sizes, 1):
        steps, wait = drawn.randrange(1, 4), drawn.random() * 0.05
        action = partial(_kill, run, size, len(set(sizes)) == 1, changes, steps, wait, drawn.choice((1, -1)))
        yield Case(f"{run.name}, kill {number}", action, refused=False)
    yield Case(f"{run.name}, its end", partial(_end, run, sizes[0], len(set(sizes)) == 1, changes), refused=False)


def _kill(run: Path, size: int, alike: bool, changes: list[str], steps: int, wait: float, order: int) -> None:
    """Start or resume it, kill it after some more steps, and look at what is left."""
    whole = _uninterrupted(run, size if alike else 1, changes)
    target = min(max(map(step_of, checkpoints(run)), default=0) + steps, STEPS - 1)
    started = _start(run, size, changes)
    try:
        wait_for_steps(run, target, lambda: all(process.is_alive() for process in started))
        time.sleep(wait)
    finally:
        for process in started[::order]:
            process.kill()
        for process in started:
            process.join(60)
    ended = [process.exitcode for process in started]
    assert ended == [-signal.SIGKILL] * size or steps_of(run) == STEPS, f"it ended with {ended}"
    _require_same(run, whole, alike)


def _end(run: Path, size: int, alike: bool, changes: list[str]) -> None:
    whole = _uninterrupted(run, size if alike else 1, changes)
    _finish(run, size, changes)
    _require_same(run, whole, alike)
    assert checkpoints(run)[-1].name == checkpoints(whole)[-1].name == f"step-{STEPS:06d}"
    assert not list((run / "checkpoints").glob(".*")), "a half written checkpoint is still there"
    ours, theirs = metrics(run), metrics(whole)
    if alike:
        assert ours == theirs, "other measurements"
    both = (_rows(each) for each in (run, whole))
    for number, (our, their) in enumerate(zip(*both, strict=True)):
        assert our == their, f"step {number} read other samples"


def _require_same(run: Path, whole: Path, alike: bool) -> None:
    """The newest checkpoint is intact, and that of the uninterrupted run of the same step."""
    if not (run / "checkpoints").exists() or not checkpoints(run):
        return
    found = find(run)
    assert not found.notes, found.notes
    other = whole / "checkpoints" / found.folder.name
    if alike:
        names = sorted(file.name for file in other.glob("*.safetensors"))
        assert names == sorted(file.name for file in found.folder.glob("*.safetensors"))
        for name in names:
            ours, theirs = load_file(found.folder / name), load_file(other / name)
            assert ours.keys() == theirs.keys()
            same = [torch.equal(x, theirs[key]) for key, x in ours.items()]
            assert all(same), f"{name} of {found.folder.name}: {same.count(False)} tensors differ"
        return
    ours, theirs = (_weights(each, found.manifest.step) for each in (run, whole))
    difference = (ours - theirs).norm() / theirs.norm()
    assert difference < 1e-5, f"weights differ by {difference:.2g}"


def _weights(run: Path, step: int) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in load_run(run, choice=step).parameters()])


def _uninterrupted(run: Path, size: int, changes: list[str]) -> Path:
    """The run that nothing happens to, from the first time that somebody asks."""
    whole = run.with_name(f"{run.name}, uninterrupted")
    if not whole.exists():
        _finish(whole, size, changes)
    return whole


def _finish(run: Path, size: int, changes: list[str]) -> None:
    started = _start(run, size, changes)
    try:
        for process in started:
            process.join(1200)
        ended = [process.exitcode for process in started]
        assert ended == [0] * size, f"it ended with {ended}"
    finally:
        for process in started:
            process.kill()


def _start(run: Path, size: int, changes: list[str]) -> list[Any]:
    resumed = (run / "config.yaml").exists()
    arguments = ["--resume", str(run)] if resumed else [*changes, "--out", str(run)]
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    log = run.with_name(f"{run.name}, rows")
    attempt = log / f"{len(list(log.glob('*')))}-{size}"
    attempt.mkdir(parents=True)
    commands = [(str(attempt / str(rank)), rank, size, port, "train", *arguments) for rank in range(size)]
    started = [
        PROCESSES.Process(target=worker_processes.command_of_rank_that_notes_rows, args=each) for each in commands
    ]
    for process in started:
        process.start()
    return started


def _rows(run: Path) -> list[list[int]]:
    """The rows of each step, as every attempt read them: of all processes that do not share them."""
    found: dict[int, list[int]] = {}
    for attempt in run.with_name(f"{run.name}, rows").iterdir():
        by_rank = []
        for file in sorted(attempt.iterdir()):  # fewer than ten
            lines = file.read_text().splitlines(keepends=True)
            by_rank.append(dict(json.loads(line) for line in lines if line.endswith("\n")))
        if len(by_rank) < int(attempt.name.split("-")[1]):
            continue  # killed before its first step
        for step in set.intersection(*map(set, by_rank)):
            rows = list(dict.fromkeys(row for each in by_rank for row in each[step]))  # some share sequences
            assert found.setdefault(step, rows) == rows, f"step {step} read other samples than before it was killed"
    assert len(set(map(len, found.values()))) == 1, "a process did not read a step"
    return [found[step] for step in range(STEPS)]
