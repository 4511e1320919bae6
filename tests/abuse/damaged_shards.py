"""Checkpoints of one, two and four processes with a damaged file: it is named, and the checkpoint before it is used.

Every file of the newest checkpoint, damaged in every way, in a process that has loaded everything: what is loaded
instead is to the bit what was written. A twentieth of the cases resume the run too.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from abuse.shards import SMALL, split
from abuse.tally import LONGEST, Case, little_memory
from safetensors.torch import load_file

from seqmix import SeqmixError, build_model, load_config, load_run, train
from seqmix.mixers.base.state import to_dict
from seqmix.training import read_config
from seqmix.training.checkpoint.files import MANIFEST_FILE, checkpoints, find
from seqmix.training.checkpoint.train_state import (
    load_model,
    load_optimizer,
    load_state,
    moments_of,
    parameters_of,
)
from seqmix.training.monitoring.events import Noted
from seqmix.training.optimizer import build_optimizer

CASES = 1820
PROCESSES = (1, 2, 4)
Damage = Callable[[Path, random.Random, list[Path]], bytes | None]
"""The new content of a file, given others in its place; None where it has none any more."""


def _flipped(file: Path, drawn: random.Random, others: list[Path]) -> bytes:
    content = bytearray(file.read_bytes())
    content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    return bytes(content)


def _header_flipped(file: Path, drawn: random.Random, others: list[Path]) -> bytes:
    content = bytearray(file.read_bytes())
    content[drawn.randrange(min(len(content), 400))] ^= 1 << drawn.randrange(8)
    return bytes(content)


def _cut(file: Path, drawn: random.Random, others: list[Path]) -> bytes:
    content = file.read_bytes()
    return content[: drawn.choice((0, 1, 7, 8, len(content) // 2, len(content) - 1, drawn.randrange(len(content))))]


def _longer(file: Path, drawn: random.Random, others: list[Path]) -> bytes:
    return file.read_bytes() + drawn.choice((b"\0", b"x", bytes(4096), drawn.randbytes(drawn.randrange(1, 99))))


def _inserted(file: Path, drawn: random.Random, others: list[Path]) -> bytes:
    content, at = file.read_bytes(), drawn.randrange(file.stat().st_size)
    return content[:at] + drawn.randbytes(drawn.randrange(1, 9)) + content[at:]


def _zeros(file: Path, drawn: random.Random, others: list[Path]) -> bytes:
    content, size = file.read_bytes(), drawn.choice((1, 8, 512, 4096, 10**9))
    at = drawn.randrange(len(content)) if size < 10**9 else 0
    return (content[:at] + bytes(min(size, len(content) - at)) + content[at + size :])[: len(content)]


def _moved(file: Path, drawn: random.Random, others: list[Path]) -> bytes:
    """Two halves of what follows a place changed places."""
    content, at = file.read_bytes(), drawn.randrange(file.stat().st_size)
    half = (len(content) - at) // 2
    return content[:at] + content[at + half :] + content[at : at + half]


def _another(file: Path, drawn: random.Random, others: list[Path]) -> bytes:
    return drawn.choice(others).read_bytes()


def _removed(file: Path, drawn: random.Random, others: list[Path]) -> None:
    file.unlink()


def _in_its_place(file: Path, drawn: random.Random, others: list[Path]) -> None:
    file.unlink()
    make: tuple[Callable[[Path], object], ...] = (
        Path.mkdir,
        os.mkfifo,
        lambda at: at.symlink_to("nothing"),
        lambda at: at.symlink_to(at.name),
        lambda at: at.symlink_to("/dev/zero"),
        lambda at: at.symlink_to(drawn.choice(others)),
    )
    drawn.choice(make)(file)


DAMAGES: tuple[Damage, ...] = (
    *(_flipped, _flipped, _header_flipped, _cut, _longer, _inserted, _zeros, _moved),
    *(_another, _removed, _in_its_place),
)


class Loader:
    """Loads what a checkpoint has, and knows what was written."""

    def __init__(self, run: Path) -> None:
        self.config = read_config(run)
        self.model = build_model(self.config.model)
        self.optimizer = build_optimizer(self.model, self.config.training)
        self.written = {
            folder.name: {part: load_file(folder / f"{part}.safetensors") for part in ("model", "optimizer", "state")}
            for folder in checkpoints(run)
        }

    def require_written(self, folder: Path) -> None:
        """To the bit."""
        load_model(folder, self.model)
        load_optimizer(folder, self.model, self.optimizer)
        state = load_state(folder, self.model, self.config.training.batch_size)
        found = {
            "model": parameters_of(self.model),
            "optimizer": moments_of(self.model, self.optimizer),
            "state": to_dict(state),
        }
        for part, tensors in self.written[folder.name].items():
            same = tensors.keys() == found[part].keys() and all(
                torch.equal(found[part][name], x) for name, x in tensors.items()
            )
            assert same, f"other values of the {part} were loaded"


def damaged_shards(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Bits, lengths, zeros, other files, none, and what is no file."""
    (folder / "text.txt").write_text("the text of a small run, over and over again. " * 60)
    for name, seed in (("1", 0), ("another", 1)):
        changes = [*SMALL, f"data.paths=[{folder / 'text.txt'}]", "training.keep_checkpoints=3", f"seed={seed}"]
        list(train(load_config("retnet-tiny", changes), folder / name))
    loader = Loader(folder / "1")
    for processes in PROCESSES[1:]:
        split(shutil.copytree(folder / "1", folder / str(processes)), processes)
    for processes in PROCESSES:
        loader.require_written(find(folder / str(processes)).folder)
    for number in range(CASES):
        run = folder / str(PROCESSES[number % len(PROCESSES)])
        before, newest = checkpoints(run)
        files = sorted(newest.iterdir())
        file = files[number // len(PROCESSES) % len(files)]
        damage = DAMAGES[number // len(PROCESSES) // len(files) % len(DAMAGES)]
        others = [x for x in (*files, before / file.name) if x != file]
        others += [x for x in (checkpoints(folder / "another")[-1] / file.name,) if x.exists()]
        what = f"{number}: {damage.__name__.strip('_')} {file.name}"
        action = partial(_use, loader, file, before, damage, random.Random(number), others, number % 20 == 0)
        yield Case(what, action, refused=False)


def _use(
    loader: Loader, file: Path, before: Path, damage: Damage, drawn: random.Random, others: list[Path], resume: bool
) -> None:
    whole = file.read_bytes()
    try:
        while (content := damage(file, drawn, others)) == whole or _same_manifest(file, content, whole):
            pass
        if content is not None:
            file.write_bytes(content)
        with little_memory():
            _require_before(loader, file, before, resume)
    except SeqmixError as error:  # a sentence, and yet nothing was loaded
        raise AssertionError(f"it was refused: {error}") from error
    finally:
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        file.unlink(missing_ok=True)
        file.write_bytes(whole)


def _require_before(loader: Loader, file: Path, before: Path, resume: bool) -> None:
    """The file is named, and the checkpoint before is loaded."""
    found = find(run := before.parents[1])
    assert found.folder == before, "the damaged checkpoint was used"
    (note,) = found.notes
    _require_named(note, file)
    loader.require_written(found.folder)
    said: list[str] = []
    model = load_run(run, on_note=said.append)
    if file.name == MANIFEST_FILE or file.name.startswith("model"):
        assert said == [note], f"it says {said}"
        written = loader.written[before.name]["model"]
        assert all(torch.equal(x, written[name]) for name, x in parameters_of(model).items())
    if resume:
        _resume(run, file, note)


def _same_manifest(file: Path, content: bytes | None, whole: bytes) -> bool:
    """Whether it says the same in other bytes."""
    try:
        return file.name == MANIFEST_FILE and content is not None and json.loads(content) == json.loads(whole)
    except (ValueError, RecursionError):
        return False


def _require_named(note: str, file: Path) -> None:
    """One sentence that says which file is damaged; where the manifest is another run's, one that it is not true of."""
    named = file.parent if file.name == MANIFEST_FILE else file
    assert str(named) in note, f"it is not named: {note[:300]!r}"
    assert note.isprintable(), repr(note[:300])
    assert len(note) <= LONGEST
    assert note.endswith("; skipped")


def _resume(run: Path, file: Path, note: str) -> None:
    copy = run.with_name("copy")
    try:
        ignored = [file.name]  # which may be a pipe
        shutil.copytree(run, copy, ignore=lambda at, names: ignored if Path(at) == file.parent else [])
        if os.path.lexists(file):
            (copy / file.relative_to(run)).symlink_to(file)
        events = list(train(read_config(copy, ["training.steps=3"]), copy, resume=True))
        notes = [event.text for event in events if isinstance(event, Noted)]
        assert note.replace(str(run), str(copy)) in notes, f"it says {notes}"
        assert events[0].step == 1
    finally:
        shutil.rmtree(copy)
