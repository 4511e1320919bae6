"""Checkpoints: folders that are written whole or not at all, and can be verified. Nothing is ever unpickled.

RUN/checkpoints/step-000500/model.safetensors        parameters
RUN/checkpoints/step-000500/optimizer.safetensors    the optimizer's moments
RUN/checkpoints/step-000500/state.safetensors        what is carried from batch to batch, where something is
RUN/checkpoints/step-000500/manifest.json            written last: what wrote it, and the others' sizes and checksums

A file is plain safetensors under the parameters' own names, which torch's distributed checkpoint reads as well
(`HuggingFaceStorageReader`). Whatever number of processes trains, the first one gathers and writes whole tensors: so
a checkpoint does not depend on their number.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, get_num_threads

from ..registry import Config, SeqmixError
from .provenance import seqmix_version
from .sharding import whole

MANIFEST_FILE = "manifest.json"

Parts = Mapping[str, Mapping[str, Tensor]]
"""The tensors of a checkpoint by part ("model", "optimizer", "state") and name; a part is a file."""

Choice = int | Literal["newest", "best"]
"""Which checkpoint of a run: that of a step, the newest, or the one of the lowest validation loss."""


class CheckpointError(SeqmixError):
    """A checkpoint is missing, damaged, or of another model."""


class Best(Config):
    """The best evaluation so far, and how long ago it was."""

    loss: float | None = None
    """Its validation loss; None before the first."""
    step: int = 0
    """After which step it was."""
    evaluations_since: int = 0
    """Evaluations since, none of which was better."""

    def after(self, step: int, loss: float) -> "Best":
        """What it is after one more evaluation."""
        if self.loss is None or loss < self.loss:
            return Best(loss=loss, step=step)
        return Best(loss=self.loss, step=self.step, evaluations_since=self.evaluations_since + 1)


class WrittenFile(Config):
    """What a file must be to be intact."""

    bytes: int
    sha256: str


class Manifest(Config):
    """What a checkpoint says of itself."""

    step: int
    """Steps made."""
    seqmix: str = Field(default_factory=seqmix_version)
    """Version that wrote it."""
    torch: str = str(torch.__version__)
    """Version that computed it."""
    threads: int = Field(default_factory=get_num_threads)
    """Threads that computed it: sums of floating-point numbers depend on their number."""
    processes: int = 1
    """Processes that computed it, likewise."""
    metrics: dict[str, float]
    """Measured after this step; `validation_loss` is there if the step was evaluated."""
    best: Best
    """Of all evaluations up to this step."""
    data: str | None = None
    """A hash of what was learned; None where that is no text, or the checkpoint is of a time before."""
    files: dict[str, WrittenFile] = Field(default_factory=dict)
    """By name."""
    sha256: str = ""
    """The checksum of all this, as JSON without it."""

    def sealed(self, files: dict[str, WrittenFile]) -> "Manifest":
        """The same with its files and its checksum."""
        whole = self.model_copy(update={"files": files})
        return whole.model_copy(update={"sha256": whole.checksum})

    @property
    def checksum(self) -> str:
        """What `sha256` is to be."""
        # fields added since the first format are left out where they say nothing
        added = {"data": None, "processes": 1}
        left_out = {"sha256", *(name for name, nothing in added.items() if getattr(self, name) == nothing)}
        return hashlib.sha256(self.model_dump_json(exclude=left_out).encode()).hexdigest()


@dataclass(frozen=True)
class Found:
    """An intact checkpoint."""

    folder: Path
    manifest: Manifest
    notes: tuple[str, ...]
    """A sentence for each damaged one that was passed over."""


# ---- writing


class Writer:
    """Writes checkpoints while training goes on: tensors are copied at once, and written by a thread, one at a time.

    Leaving the context waits for the last one. A failure to write is raised by whatever waits next.
    """

    def __init__(self, run: Path, *, keep: int, keep_best: bool) -> None:
        self.run, self.keep, self.keep_best = run, keep, keep_best
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Path, Future[None]] | None = None

    def write(self, manifest: Manifest, parts: Parts, metadata: dict[str, str]) -> Path:
        """Begin to write a checkpoint, when the one before is done, to a folder that appears when it is complete."""
        self.wait()
        # copies in main memory, which no later step changes, of all pieces
        copies = {
            part: {name: whole(x.detach()).to("cpu", copy=True).contiguous() for name, x in tensors.items()}
            for part, tensors in parts.items()
        }
        folder = folder_of(self.run, manifest.step)
        self._pending = folder, self._thread.submit(self._write, manifest, copies, metadata)
        return folder

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, if one is; CheckpointError if it could not be."""
        if self._pending is None:
            return
        (folder, done), self._pending = self._pending, None
        if error := done.exception():
            raise CheckpointError(f"the checkpoint {folder} could not be written: {error}") from error

    def _write(self, manifest: Manifest, parts: Parts, metadata: dict[str, str]) -> None:
        try:
            write(self.run, manifest, parts, metadata)
        except Exception:
            drop_unfinished(self.run)  # half of one would keep a full disk full
            raise
        drop_others(self.run, manifest.step, keep=self.keep, keep_best=self.keep_best)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self.wait()
        except CheckpointError:
            if kind is None:  # what already goes wrong is reported first
                raise
        finally:
            self._thread.shutdown()


def write(run: Path, manifest: Manifest, parts: Parts, metadata: dict[str, str]) -> Path:
    """Write a checkpoint; its folder appears, with everything on the disk, when it is complete."""
    folder = folder_of(run, manifest.step)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for part, tensors in parts.items():
        save_file(dict(tensors), partial / file_of(part), metadata)
    files = {file.name: WrittenFile(bytes=file.stat().st_size, sha256=_sha256(file)) for file in partial.iterdir()}
    sealed = manifest.sealed(dict(sorted(files.items())))
    (partial / MANIFEST_FILE).write_text(sealed.model_dump_json(indent=2) + "\n")
    for path in (*partial.iterdir(), partial):
        flush(path)
    _remove(folder)
    partial.rename(folder)
    flush(folder.parent)
    return folder


def drop_others(run: Path, step: int, *, keep: int, keep_best: bool) -> None:
    """Remove all checkpoints but the newest `keep` and the best; those after `step` are of a past that was undone."""
    kept = [folder for folder in checkpoints(run) if step_of(folder) <= step][-keep:]
    if keep_best:
        kept += _by_loss(run)[:1]
    for folder in checkpoints(run):
        if folder not in kept:
            _remove(folder)


def drop_unfinished(run: Path) -> None:
    """Remove what a killed process was writing or removing."""
    for folder in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(folder)


# ---- reading


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; whether they are intact, `verify` says."""
    folders = (f for f in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", f.name) and f.is_dir())
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step a checkpoint was written after."""
    return int(folder.name.removeprefix("step-"))


def file_of(part: str) -> str:
    """The name of the file that holds a part."""
    return f"{part}.safetensors"


def find(run: Path, which: Choice = "newest", *, parts: tuple[str, ...] | None = None) -> Found:
    """An intact checkpoint: where the newest (or the best) is damaged, the one before it (or the next best).

    Only `parts` need be intact, where they are given. CheckpointError: there is none, or none that is intact.
    """
    there = checkpoints(run)
    if not there:
        raise CheckpointError(f"{run} holds no checkpoint")
    if isinstance(which, int):
        candidates = [folder for folder in there if step_of(folder) == which]
    else:
        candidates = there[::-1] if which == "newest" else _by_loss(run)
    if not candidates:
        what = "was evaluated" if which == "best" else f"is of step {which}"
        raise CheckpointError(
            f"no checkpoint of {run} {what}; there are those of step {', '.join(str(step_of(f)) for f in there)}"
        )
    notes: list[str] = []
    for folder in candidates:
        try:
            return Found(folder, verify(folder, parts), tuple(f"{note}; passed over" for note in notes))
        except CheckpointError as error:
            notes.append(str(error))
    raise CheckpointError(notes[0] + (f"; and none of the {len(notes) - 1} others is intact" if notes[1:] else ""))


def verify(folder: Path, parts: tuple[str, ...] | None = None) -> Manifest:
    """The manifest of a checkpoint whose files (or those of `parts`) are as it says; CheckpointError: what is not."""
    manifest = read_manifest(folder)
    wanted = manifest.files if parts is None else [file_of(part) for part in parts]
    for name in wanted:
        file, written = folder / name, manifest.files.get(name)
        if written is None:
            raise CheckpointError(f"{folder / MANIFEST_FILE} is damaged: it does not name {name}")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if (size := file.stat().st_size) != written.bytes:
            raise CheckpointError(f"{file} is damaged: it has {size:,} bytes, and was written with {written.bytes:,}")
        if _sha256(file) != written.sha256:
            raise CheckpointError(f"{file} is damaged: its checksum is not the one it was written with")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """What a checkpoint says of itself; CheckpointError: that is missing, damaged, or of another step."""
    file = folder / MANIFEST_FILE
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: it is no manifest") from error
    if manifest.sha256 != manifest.checksum:
        raise CheckpointError(f"{file} is damaged: its checksum is not the one it was written with")
    if manifest.step != step_of(folder):
        raise CheckpointError(f"{file} is damaged: it is of step {manifest.step}")
    return manifest


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; CheckpointError: it is missing, damaged, or no such file."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing" if not file.exists() else f"{file} is no file")
    try:
        with safe_open(file, "pt") as tensors:
            found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 not a mapping
            return found, tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or no safetensors file: {error}") from error


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, which appears when it is complete and on the disk, in place of an older one."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
        flush(partial)
        partial.replace(file)
    except Exception as error:  # safetensors has errors of its own for a full disk
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise CheckpointError(f"{file} cannot be written: {error}") from error


def flush(path: Path) -> None:
    """Make sure that the disk has it: a renamed folder must not outlive its contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def folder_of(run: Path, step: int) -> Path:
    """Where a run has the checkpoint after a step."""
    return run / "checkpoints" / f"step-{step:06d}"


def _by_loss(run: Path) -> list[Path]:
    """The checkpoints that were evaluated, the best first; of equal ones, the oldest."""
    losses: dict[Path, float] = {}
    for folder in checkpoints(run):
        with suppress(CheckpointError, KeyError):
            losses[folder] = read_manifest(folder).metrics["validation_loss"]
    return sorted(losses, key=lambda folder: losses[folder])


def _remove(folder: Path) -> None:
    """Remove a checkpoint, so that half of one is never taken for one."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.dropped")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
