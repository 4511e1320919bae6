"""Checkpoints: directories that are written atomically and verified by checksum. Nothing is ever unpickled.

RUN/checkpoints/step-000500/model.safetensors        parameters
RUN/checkpoints/step-000500/optimizer.safetensors    the optimizer's state (moments)
RUN/checkpoints/step-000500/state.safetensors        the recurrent state, with training.carry_state
RUN/checkpoints/step-000500/manifest.json            written last: versions, and the size and checksum of each file

Files are plain safetensors under the parameters' own names, which torch's distributed checkpoint reads as well
(`HuggingFaceStorageReader`). Rank 0 gathers and writes full tensors, so a checkpoint does not depend on the number of
processes.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, get_num_threads

from ..registry import Config, SeqmixError, flush, nearest, replacing
from .provenance import seqmix_version
from .sharding import full_tensor

MANIFEST_FILE = "manifest.json"

Parts = Mapping[str, Mapping[str, Tensor]]
"""The tensors of a checkpoint by part ("model", "optimizer", "state") and name; a part is a file."""

Choice = int | Literal["newest", "best"]
"""Which checkpoint of a run: a step, the newest, or the one with the lowest validation loss."""


class CheckpointError(SeqmixError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class Best(Config):
    """The best evaluation so far."""

    loss: float | None = None
    """Its validation loss; None before the first evaluation."""
    step: int = 0
    """Its step."""
    evaluations_since: int = 0
    """Evaluations since then, without improvement."""

    def after(self, step: int, loss: float) -> "Best":
        """The best after one more evaluation."""
        if self.loss is None or loss < self.loss:
            return Best(loss=loss, step=step)
        return Best(loss=self.loss, step=self.step, evaluations_since=self.evaluations_since + 1)


class WrittenFile(Config):
    """Size and checksum of an intact file."""

    bytes: int
    sha256: str


class Manifest(Config):
    """The contents of `manifest.json`."""

    step: int
    """Steps completed."""
    seqmix: str = Field(default_factory=seqmix_version)
    """Version that wrote it."""
    torch: str = str(torch.__version__)
    """Version that computed it."""
    threads: int = Field(default_factory=get_num_threads)
    """Threads that computed it: floating-point sums depend on their number."""
    processes: int = 1
    """Processes that computed it, likewise."""
    metrics: dict[str, float]
    """Measured after this step; `validation_loss` is there if the step was evaluated."""
    best: Best
    """Of all evaluations up to this step."""
    data: str | None = None
    """A hash of the training data; None for a task, or for a checkpoint of an older version."""
    data_state: dict[str, Any] | None = None
    """The place in streamed data; None if batches are a function of seed and step alone."""
    files: dict[str, WrittenFile] = Field(default_factory=dict)
    """By name."""
    sha256: str = ""
    """The checksum of this manifest, as JSON without this field."""

    def sealed(self, files: dict[str, WrittenFile]) -> "Manifest":
        """The manifest with its files and its checksum."""
        complete = self.model_copy(update={"files": files})
        return complete.model_copy(update={"sha256": complete.checksum})

    @property
    def checksum(self) -> str:
        """The expected value of `sha256`."""
        # fields added since the first format are omitted at their default
        added = {"data": None, "data_state": None, "processes": 1}
        omitted = {"sha256", *(name for name, default in added.items() if getattr(self, name) == default)}
        return hashlib.sha256(self.model_dump_json(exclude=omitted).encode()).hexdigest()


@dataclass(frozen=True)
class Found:
    """An intact checkpoint."""

    folder: Path
    manifest: Manifest
    notes: tuple[str, ...]
    """A sentence for each damaged checkpoint that was skipped."""


class Writer:
    """Writes checkpoints asynchronously: tensors are copied to the CPU, and a thread writes them, one at a time.

    Leaving the context waits for the last write. A failed write raises at the next wait.
    """

    def __init__(self, run: Path, *, keep: int, keep_best: bool) -> None:
        self.run, self.keep, self.keep_best = run, keep, keep_best
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Path, Future[None]] | None = None

    def write(self, manifest: Manifest, parts: Parts, metadata: dict[str, str]) -> Path:
        """Start to write a checkpoint after the previous one; its folder appears when it is complete."""
        self.wait()
        # copies of the full tensors in main memory, which no later step changes
        copies = {
            part: {name: full_tensor(x.detach()).to("cpu", copy=True).contiguous() for name, x in tensors.items()}
            for part, tensors in parts.items()
        }
        folder = folder_of(self.run, manifest.step)
        self._pending = folder, self._thread.submit(self._write, manifest, copies, metadata)
        return folder

    def wait(self) -> None:
        """Wait for a pending write; CheckpointError if it failed."""
        if self._pending is None:
            return
        (folder, done), self._pending = self._pending, None
        if error := done.exception():
            raise CheckpointError(f"the checkpoint {folder} could not be written: {error}") from error

    def _write(self, manifest: Manifest, parts: Parts, metadata: dict[str, str]) -> None:
        try:
            write(self.run, manifest, parts, metadata)
        except Exception:
            delete_unfinished(self.run)  # frees space on a full disk
            raise
        delete_others(self.run, manifest.step, keep=self.keep, keep_best=self.keep_best)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self.wait()
        except CheckpointError:
            if kind is None:  # the first error is the one to report
                raise
        finally:
            self._thread.shutdown()


def write(run: Path, manifest: Manifest, parts: Parts, metadata: dict[str, str]) -> Path:
    """Write a checkpoint; its folder appears when it is complete and flushed to disk."""
    folder = folder_of(run, manifest.step)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for part, tensors in parts.items():
        with replacing(partial / file_of(part)) as file:
            save_file(dict(tensors), file, metadata)
    files = {file.name: WrittenFile(bytes=file.stat().st_size, sha256=_sha256(file)) for file in partial.iterdir()}
    sealed = manifest.sealed(dict(sorted(files.items())))
    (partial / MANIFEST_FILE).write_text(sealed.model_dump_json(indent=2) + "\n")
    for path in (partial / MANIFEST_FILE, partial):
        flush(path)
    _remove(folder)
    partial.rename(folder)
    flush(folder.parent)
    return folder


def delete_others(run: Path, step: int, *, keep: int, keep_best: bool) -> None:
    """Delete all checkpoints but the newest `keep` and the best; those after `step` are obsolete."""
    retained = [folder for folder in checkpoints(run) if step_of(folder) <= step][-keep:]
    if keep_best:
        retained += _by_loss(run)[:1]
    for folder in checkpoints(run):
        if folder not in retained:
            _remove(folder)


def delete_unfinished(run: Path) -> None:
    """Delete what a killed process left half written or half deleted."""
    for folder in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(folder)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; `verify` checks that they are intact."""
    folders = (f for f in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", f.name) and f.is_dir())
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step a checkpoint was written after."""
    return int(folder.name.removeprefix("step-"))


def file_of(part: str) -> str:
    """The name of the file that holds a part."""
    return f"{part}.safetensors"


def find(run: Path, which: Choice = "newest", *, parts: tuple[str, ...] | None = None) -> Found:
    """An intact checkpoint: if the newest (or the best) is damaged, the previous one (or the next best).

    `parts` limits which files must be intact. CheckpointError: there is no checkpoint, or none is intact.
    """
    available = checkpoints(run)
    if not available:
        raise CheckpointError(f"{run} holds no checkpoint")
    if isinstance(which, int):
        candidates = [folder for folder in available if step_of(folder) == which]
    elif which not in (names := ("newest", "best")):
        raise CheckpointError(f"a checkpoint is newest, best or a step, and was given {which!r}{nearest(which, names)}")
    else:
        candidates = available[::-1] if which == "newest" else _by_loss(run)
    if not candidates:
        what = "an evaluated checkpoint" if which == "best" else f"a checkpoint of step {which}"
        steps = ", ".join(str(step_of(folder)) for folder in available)
        raise CheckpointError(f"{run} does not hold {what}; it has those of step {steps}")
    notes: list[str] = []
    for folder in candidates:
        try:
            return Found(folder, verify(folder, parts), tuple(f"{note}; skipped" for note in notes))
        except CheckpointError as error:
            if not folder.exists():  # a run that trains has deleted it meanwhile, and has newer ones
                return find(run, which, parts=parts)
            notes.append(str(error))
    raise CheckpointError(notes[0] + (f"; the {len(notes) - 1} others are damaged too" if notes[1:] else ""))


def read(run: Path, which: Choice, part: str, use: Callable[[Path], object]) -> Found:
    """Find a checkpoint by an intact part and `use` its folder; if a run that trains deletes it meanwhile, the next."""
    while True:
        found = find(run, which, parts=(part,))
        try:
            use(found.folder)
        except CheckpointError:
            if found.folder.exists():
                raise
        else:
            return found


def verify(folder: Path, parts: tuple[str, ...] | None = None) -> Manifest:
    """The manifest, after all files (or those of `parts`) were checked against it; CheckpointError: one differs."""
    manifest = read_manifest(folder)
    wanted = manifest.files if parts is None else [file_of(part) for part in parts]
    for name in wanted:
        file, written = folder / name, manifest.files.get(name)
        if written is None:
            raise CheckpointError(f"{folder / MANIFEST_FILE} is damaged: it does not name {name}")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if (size := file.stat().st_size) != written.bytes:
            raise CheckpointError(f"{file} is damaged: it has {size:,} bytes instead of {written.bytes:,}")
        if _sha256(file) != written.sha256:
            raise CheckpointError(f"{file} is damaged: its checksum does not match")
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; CheckpointError: it is missing, damaged, or names another step."""
    file = folder / MANIFEST_FILE
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise CheckpointError(f"{file} is damaged: it is not a manifest") from error
    if manifest.sha256 != manifest.checksum:
        raise CheckpointError(f"{file} is damaged: its checksum does not match")
    if manifest.step != step_of(folder):
        raise CheckpointError(f"{file} is damaged: it is of step {manifest.step}")
    return manifest


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; CheckpointError: it cannot be read."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing" if not file.exists() else f"{file} is not a file")
    try:
        with safe_open(file, "pt") as tensors:
            found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 not a mapping
            return found, tensors.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged or not a safetensors file: {error}") from error


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file; it replaces an older one when it is complete and flushed to disk."""
    try:
        with replacing(file) as partial:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    except Exception as error:  # safetensors raises its own error for a full disk
        raise CheckpointError(f"{file} cannot be written: {error}") from error


def folder_of(run: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:06d}"


def _by_loss(run: Path) -> list[Path]:
    """The evaluated checkpoints, best first; ties go to the oldest."""
    losses: dict[Path, float] = {}
    for folder in checkpoints(run):
        with suppress(CheckpointError, KeyError):
            losses[folder] = read_manifest(folder).metrics["validation_loss"]
    return sorted(losses, key=lambda folder: losses[folder])


def _remove(folder: Path) -> None:
    """Delete a checkpoint; a half deleted one is never visible under its name."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.deleted")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
