"""Checkpoints of two processes of anyone's making: checksums match, and what the files say of each other does not."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import torch
from abuse.tally import Case
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seqmix import load_config, load_run, train
from seqmix.training import read_config
from seqmix.training.checkpoint.files import MANIFEST_FILE, WrittenFile, checkpoints, read_manifest
from seqmix.training.tensor_files import OFFSETS_KEY, OFFSETS_METADATA, Chunk, write_chunks

SMALL = (
    *("model.d_model=16", "model.n_layers=1", "data.sequence_length=16", "training.steps=2", "training.batch_size=2"),
    *("training.evaluation_batches=1", "training.final_evaluation_batches=1", "training.checkpoint_every=1"),
    "training.carry_state=true",
)
JSON = ("", "{", "[]", "1", "null", '"x"', "NaN", "9" * 5000, "[" * 10**5, '{"a":' * 10**5, '{"a": {}}')
OFFSETS = (
    "[]",
    "[0]",
    "[-1, 0]",
    "[1, 0]",
    "[9, 0]",
    "[0, 1]",
    "[0, 0, 0]",
    "null",
    "{}",
    '"00"',
    "[0.5, 0]",
    '["8", 0]',
)
OFFSETS += ("[true, false]", "[1e308, 0]", f"[{2**63}, 0]", f"[{10**400}, 0]", "[[8], 0]", "[NaN, 0]", "[" * 10**5)
SIZES = (0, -1, 2**40, 2**63, 10**30, 1.5, None, "x", [])
NAMES = (
    "../model.safetensors",
    "/etc/passwd",
    "/dev/zero",
    "..",
    ".",
    "",
    "a/b.safetensors",
    "model\x1b[2J",
    "x" * 10**5,
)
NAMES += ("model-3-of-2.safetensors", "model-1-of-9.safetensors", "model.safetensors", "ema-1-of-2.safetensors")
DTYPES = (torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8)


def shards(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Offsets, headers, types and names of the files of two processes, and links in their place."""
    (folder / "text.txt").write_text("the text of a small run, over and over again. " * 60)
    list(train(load_config("retnet-tiny", [*SMALL, f"data.paths=[{folder / 'text.txt'}]"]), folder / "run"))
    split(folder / "run")
    number = count()
    here, stray = "model-2-of-2.safetensors", folder / "stray.safetensors"
    shutil.copy(checkpoints(folder / "run")[-1] / here, stray)
    name = next(name for name, x in load_file(stray).items() if x.ndim == 2)

    def case(what: str, change: Callable[[Path], object], refused: bool = True) -> Case:
        return Case(what, partial(_use, folder / "run", folder / str(next(number)), change), refused)

    yield case("whole", lambda at: None, refused=False)
    for part in ("model", "optimizer", "state"):
        file = f"{part}-2-of-2.safetensors"
        for text in JSON:
            yield case(f"{part} offsets {text[:12]!r}", partial(_rewrite, file, {OFFSETS_METADATA: text}))
    for text in OFFSETS:
        yield case(f"begins at {text[:20]}", partial(_begin, here, name, text))
    for dtype in DTYPES:
        yield case(f"half as {dtype}", partial(_rewrite, here, {}, lambda x, d=dtype: x | {name: x[name].to(d)}))
    changes: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
        "absent": lambda x: {key: value for key, value in x.items() if key != name},
        "additional": lambda x: x | {"additional": x[name].clone()},
        "shorter": lambda x: x | {name: x[name][:-1]},
        "longer": lambda x: x | {name: torch.cat((x[name], x[name]))},
        "flat": lambda x: x | {name: x[name].flatten()},
        "of no rows": lambda x: x | {name: x[name][:0]},
        "a path": lambda x: x | {"../../" + name: x[name].clone()},
        "a long name": lambda x: x | {"x" * 10**5: x[name].clone()},
        "control characters": lambda x: x | {"\x1b[2J\n": x[name].clone()},
    }
    for what, change in changes.items():
        yield case(f"a tensor {what}", partial(_rewrite, here, {}, change))
    yield case("an overlap as large as a gap", partial(_overlap, name))
    for size in SIZES:
        for field in ("shape", "data_offsets") if size != 0 else ("shape",):  # where the first tensor begins
            yield case(f"header {field} {size!r}", partial(_header, here, name, field, size))
    for length in (0, 7, 2**31, 2**63 - 1, 2**64 - 1):
        yield case(f"a header of {length} bytes", partial(_header_length, here, length))
    for other in NAMES:
        yield case(f"the manifest names {other[:30]!r}", partial(_name, here, other))
        yield case(f"the manifest has {other[:30]!r} too", partial(_name, None, other))
    for size in SIZES:
        yield case(f"the manifest says {size!r} bytes", partial(_size, here, size))
    links: dict[str, Callable[[Path], object]] = {
        "zeros": lambda at: at.symlink_to("/dev/zero"),
        "itself": lambda at: at.symlink_to(at.name),
        "nothing": lambda at: at.symlink_to("nothing"),
        "its folder": lambda at: at.symlink_to("."),
        "the other half": lambda at: at.symlink_to(here.replace("2-of", "1-of")),
        "a pipe": os.mkfifo,
        "a folder": Path.mkdir,
        "memory": lambda at: at.symlink_to("/proc/self/status"),
    }
    for what, make in links.items():
        yield case(f"{what} in its place", partial(_replace, here, make))
    yield case("a link to its copy", partial(_replace, here, lambda at: at.symlink_to(stray)), refused=False)


def split(run: Path, processes: int = 2) -> None:
    """Write a run's checkpoints as several processes do: each has as many rows, and the last what is left."""
    for folder in checkpoints(run):
        for file in list(folder.glob("*.safetensors")):
            parts: list[dict[str, Chunk]] = [{} for _ in range(processes)]
            for name, x in load_file(file).items():
                rows = x.shape[0] // processes if x.ndim else 0
                for number, part in enumerate(parts if rows else parts[:1]):
                    stop = None if number == processes - 1 or not rows else (number + 1) * rows
                    begin = (number * rows, *(0 for _ in x.shape[1:])) if x.ndim else ()
                    part[name] = Chunk(x[number * rows : stop] if x.ndim else x, begin, tuple(x.shape))
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            for number, chunks in enumerate(parts, 1):
                write_chunks(file.with_stem(f"{file.stem}-{number}-of-{processes}"), chunks, metadata)
            file.unlink()
        seal(folder)


def seal(folder: Path, add: tuple[str, ...] = ()) -> None:
    """A manifest that is true to the files, and to others that it names."""
    names = [*(file.name for file in folder.glob("*.safetensors")), *add]
    contents = {name: (folder / name).read_bytes() if os.path.isfile(folder / name) else b"" for name in names}
    files = {name: WrittenFile(bytes=len(x), sha256=sha256(x).hexdigest()) for name, x in contents.items()}
    (folder / MANIFEST_FILE).write_text(read_manifest(folder).seal(files).model_dump_json())


def _rewrite(
    name: str, more: dict[str, str], change: Callable[[dict[str, Any]], dict[str, Any]] = dict, *, folder: Path
) -> None:
    with safe_open(folder / name, "pt") as opened:
        metadata = opened.metadata()
    tensors = change(load_file(folder / name))
    begins = json.loads(metadata[OFFSETS_METADATA])
    begins |= {key: {OFFSETS_KEY: [0] * x.ndim} for key, x in tensors.items() if key not in begins}
    save_file(
        {key: x.contiguous() for key, x in tensors.items()},
        folder / name,
        metadata | {OFFSETS_METADATA: json.dumps(begins)} | more,
    )


def _begin(name: str, tensor: str, text: str, *, folder: Path) -> None:
    with safe_open(folder / name, "pt") as opened:
        begins = json.loads(opened.metadata()[OFFSETS_METADATA])
    begins[tensor] = {OFFSETS_KEY: "@"}
    _rewrite(name, {OFFSETS_METADATA: json.dumps(begins).replace('"@"', text)}, folder=folder)


def _overlap(tensor: str, *, folder: Path) -> None:
    """The first rows of the second half are missing, and as many of the first are there twice: sizes add up."""
    second, third = folder / "model-2-of-2.safetensors", folder / "model-3-of-3.safetensors"
    rows = load_file(second)[tensor]
    _rewrite(second.name, {}, lambda x: x | {tensor: rows[len(rows) // 2 :].clone()}, folder=folder)
    _begin(second.name, tensor, f"[{len(rows) + len(rows) // 2}, 0]", folder=folder)
    save_file(
        {tensor: rows[: len(rows) // 2].clone()}, third, {OFFSETS_METADATA: json.dumps({tensor: {OFFSETS_KEY: [0, 0]}})}
    )


def _header(name: str, tensor: str, field: str, value: object, *, folder: Path) -> None:
    content = (folder / name).read_bytes()
    length = int.from_bytes(content[:8], "little")
    tree = json.loads(content[8 : 8 + length])
    tree[tensor][field][0] = value
    header = json.dumps(tree).encode()
    (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def _header_length(name: str, length: int, *, folder: Path) -> None:
    (folder / name).write_bytes(length.to_bytes(8, "little") + (folder / name).read_bytes()[8:])


def _name(name: str | None, other: str, *, folder: Path) -> tuple[str, ...]:
    if name is not None:
        (folder / name).unlink()
    return (other,)


def _size(name: str, size: object, *, folder: Path) -> bool:
    tree = json.loads((folder / MANIFEST_FILE).read_text())
    tree["files"][name]["bytes"] = size
    (folder / MANIFEST_FILE).write_text(json.dumps(tree))
    return False


def _replace(name: str, make: Callable[[Path], object], *, folder: Path) -> None:
    (folder / name).unlink()
    make(folder / name)


def _use(good: Path, run: Path, change: Callable[..., Any]) -> None:
    """Change all checkpoints of a copy of the run, seal them, load it and resume it."""
    shutil.copytree(good, run)
    try:
        for folder in checkpoints(run):
            added = change(folder=folder) if isinstance(change, partial) else change(folder)
            if added is not False:
                seal(folder, added or ())
        list(train(read_config(run, ["training.steps=3"]), run, resume=True))
        load_run(run)
    finally:
        shutil.rmtree(run)
