"""Texts that nobody expects: too short, in one long line, under names that are not UTF-8, in devices."""

import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

from abuse.tally import Case

from seqmix import load_config
from seqmix.cli.commands.tokenize import tokenize
from seqmix.cli.progress import run_with_progress
from seqmix.models import train_bpe

SMALL = (
    *("model.d_model=16", "model.n_layers=1", "model.vocab_size=400", "training.steps=1", "training.batch_size=2"),
    *("training.evaluation_batches=1", "training.final_evaluation_batches=1"),
)
TEXT = b"the text of a small run, over and over again. "
LONG = 30_000_000
LINES = {
    "a letter": lambda: b"a" * LONG,
    "words": lambda: b"a word " * (LONG // 7),
    "a character of three bytes": lambda: "\u20ac".encode() * (LONG // 3),
    "zeros": lambda: b"\0" * LONG,
    "half a character": lambda: b"a" * (LONG - 1) + b"\xe2",
    "carriage returns": lambda: b"a\r" * (LONG // 2),
}
JSON_LINES = {
    "a letter": lambda: json.dumps({"text": "a" * LONG}).encode(),
    "escapes": lambda: b'{"text": "' + b"\\u20ac" * (LONG // 6) + b'"}',
    "half a surrogate": lambda: b'{"text": "' + b"a" * LONG + b'\\ud800"}',
    "no end": lambda: b'{"text": "' + b"a" * LONG,
    "brackets": lambda: b'{"text": ' + b"[" * LONG,
    "digits": lambda: b'{"text": ' + b"9" * LONG + b"}",
    "spaces": lambda: b" " * LONG,
    "fields": lambda: b'{"text": "a"' + b', "x": 1' * (LONG // 8) + b"}",
}
NAMES = (
    b"\xff.txt",
    b"\xe2\x82.txt",
    b"a\xed\xa0\x80.txt",
    b"\xff.jsonl",
    b"\xff",
    b"\n.txt",
    b"\x1b[2J.txt",
    b"\xff.gz",
)


def texts(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Texts of every length near a sequence's, names that are not text, and what is no file."""
    number = count()
    good = folder / "good.txt"
    good.write_bytes(TEXT * 60)

    def new(name: str = "") -> Path:
        made = folder / str(next(number))
        made.mkdir()
        return made / name

    for size in (0, 1, 2, 15, 16, 17, 18, 33, 340, 341):
        for length in (16, 256):
            for split in ("tail", "by_document", "by_file", "auto"):
                changes = [f"data.sequence_length={length}", f"data.split={split}"]
                yield Case(
                    f"{size} bytes of sequences of {length}, {split}",
                    partial(_written, new("a.txt"), TEXT * 8, size, changes),
                    refused=length == 256 or split in ("by_document", "by_file") or size < 340,
                )
    for name in NAMES:
        where = os.fsdecode(name)
        for what, place in (("file", new() / where), ("folder", new() / where / "a.txt")):
            for action in (_by_path, _in_its_folder, _as_tokens, _as_a_run):
                case = partial(_named, place, action, good)
                yield Case(f"a {what} named {name!r} {action.__name__}", case, refused=False)
    for name, make in PLACES.items():
        for what, changes in USES.items():
            whole = partial(_beside, new(), make, good, changes)
            yield Case(f"{name} {what}", whole, refused=what != "in a folder beside a text")


def lines(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """A text and a JSON line of 30 MB, with bytes and with a vocabulary."""
    train_bpe([("a", TEXT)], 300, folder / "t.json")
    number = count()
    for suffix, kinds in ((".txt", LINES), (".jsonl", JSON_LINES)):
        for name, content in kinds.items():
            for tokenizer in ("bytes", folder / "t.json"):
                file = folder / f"{next(number)}{suffix}"
                changes = [f"data.tokenizer={tokenizer}"]
                action = partial(_of_a_line, file, content, changes)
                yield Case(f"a line of {name} {suffix} {str(tokenizer)[-6:]}", action, refused=False)


def _train(where: Path, changes: list[str]) -> None:
    run_with_progress(load_config("retnet-tiny", [*SMALL, *changes]), where, resume=False)


def _written(file: Path, text: bytes, size: int, changes: list[str]) -> None:
    file.write_bytes(text[:size])
    _train(file.parent / "run", [*changes, f"data.paths=[{file}]"])


def _of_a_line(file: Path, content: Callable[[], bytes], changes: list[str]) -> None:
    file.write_bytes(content())
    try:
        _train(file.with_suffix(".run"), ["data.sequence_length=16", *changes, f"data.paths=[{file}]"])
    finally:
        file.unlink()


def _named(place: Path, action: Callable[[Path, Path], None], good: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(good.read_bytes())
    action(place, good)


def _by_path(place: Path, good: Path) -> None:
    _train(place.parent.parent / "run", ["data.sequence_length=16", f"data.paths=[{json.dumps(str(place))}]"])


def _in_its_folder(place: Path, good: Path) -> None:
    _train(place.parent.parent / "run", ["data.sequence_length=16", f"data.paths=[{place.parent.parent}]"])


def _as_tokens(place: Path, good: Path) -> None:
    out = place.with_suffix(".tokens")
    tokenize([str(place)], out=out)
    _train(place.parent.parent / "run", ["data.sequence_length=16", f"data.paths=[{json.dumps(str(out))}]"])


def _as_a_run(place: Path, good: Path) -> None:
    _train(place.parent / f"{place.name}-run", ["data.sequence_length=16", f"data.paths=[{good}]"])


def _socket(place: Path) -> Path:
    here = os.open(place.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{here}/{place.name}")  # a path of a socket is short
    os.close(here)
    return place


def _link(place: Path, target: str | Path) -> Path:
    place.symlink_to(target)
    return place


def _pipe(place: Path) -> Path:
    os.mkfifo(place)
    return place


def _folder(place: Path) -> Path:
    place.mkdir()
    return place


PLACES: dict[str, Callable[[Path], Path]] = {
    "a pipe": _pipe,
    "a socket": _socket,
    "an empty folder": _folder,
    "a link to itself": lambda place: _link(place, place.name),
    "a link to nothing": lambda place: _link(place, "nothing"),
    "zeros": lambda place: Path("/dev/zero"),
    "nothing": lambda place: Path("/dev/null"),
    "random bytes": lambda place: Path("/dev/urandom"),
    "the terminal": lambda place: Path("/dev/tty"),
    "memory": lambda place: Path("/proc/self/mem"),
}
USES: dict[str, Callable[[Path, Path, Path], list[str]]] = {
    "by its path": lambda place, folder, good: [f"data.paths=[{place}]"],
    "beside a text": lambda place, folder, good: [f"data.paths=[{good}, {place}]"],
    "in a mixture": lambda place, folder, good: [
        f"data.sources=[{{paths: [{good}], weight: 1}}, {{paths: [{place}], weight: 2}}]"
    ],
    "as validation": lambda place, folder, good: [f"data.paths=[{good}]", f"data.validation={{paths: [{place}]}}"],
    "as a tokenizer": lambda place, folder, good: [f"data.paths=[{good}]", f"data.tokenizer={place}"],
    "to start from": lambda place, folder, good: [f"data.paths=[{good}]", f"training.start_from={place}"],
    "as a token file": lambda place, folder, good: [f"data.paths=[{_link(folder / 'b.tokens', place)}]"],
    "compressed": lambda place, folder, good: [f"data.paths=[{_link(folder / 'b.txt.gz', place)}]"],
    "in a folder": lambda place, folder, good: [f"data.paths=[{_link(folder / 'b.txt', place).parent}]"],
    "in a folder beside a text": lambda place, folder, good: [
        f"data.paths=[{Path(shutil.copy(good, _link(folder / 'b.txt', place).parent)).parent}]"
    ],
}


def _beside(
    folder: Path, make: Callable[[Path], Path], good: Path, changes: Callable[[Path, Path, Path], list[str]]
) -> None:
    (texts := folder / "texts").mkdir()
    place = make(folder / "a.txt")
    _train(folder / "run", ["data.sequence_length=16", *changes(place, texts, good)])
