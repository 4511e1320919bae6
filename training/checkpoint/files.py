"""Checkpoints: directories that are written atomically and verified by checksum. Nothing is ever unpickled.

RUN/checkpoints/step-000500/model.safetensors        parameters
RUN/checkpoints/step-000500/optimizer.safetensors    the optimizer's state (moments)
RUN/checkpoints/step-000500/state.safetensors        the recurrent state, with training.carry_state
RUN/checkpoints/step-000500/manifest.json            written last: versions, and the size and checksum of each file

Each of several processes writes the chunks that it holds, to model-1-of-2.safetensors and so on, and reads those that
it needs, from checkpoints of any number of processes. `HuggingFaceStorageReader` of torch's distributed checkpoint
reads both.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, ValidationError
from torch import get_num_threads

from ...registry import Config, SeqmixError, flush, nearest, read_bytes
from ..distributed.process_groups import ALONE, ProcessGroups
from ..tensor_files import CheckpointError, Chunk, write_chunks
from .provenance import seqmix_version

MANIFEST_FILE = "manifest.json"

Parts = Mapping[str, Mapping[str, Chunk]]
"""What a process has of a checkpoint, by part ("model", "optimizer", "state") and the tensor's name."""

Choice = int | Literal["newest", "best"]
"""Which checkpoint of a run: a step, the newest, or the one with the lowest validation loss."""


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
    context_parallel: int = 1
    """How many of them shared each sequence."""
    metrics: dict[str, float]
    """Measured after this step; `validation_loss` is there if the step was evaluated."""
    best: Best
    """Of all evaluations up to this step."""
    data: str | None = None
    """A hash of the training data; None for a task, or for a checkpoint of an older version."""
    data_state: dict[str, Any] | None = None
    """The place in streamed data; None if batches are a function of seed and step alone."""
    skipped_steps: int = 0
    """Steps that left the parameters as they are."""
    gradient_norms: tuple[float, ...] = Field(default=(), strict=False)
    """Of the last steps, with training.max_grad_norm_spike."""
    files: dict[str, WrittenFile] = Field(default_factory=dict)
    """By name."""
    sha256: str = ""
    """The checksum of this manifest, as JSON without this field."""

    def files_of(self, part: str) -> list[str]:
        """The files of a part."""
        return [name for name in self.files if re.fullmatch(rf"{part}(-\d+-of-\d+)?\.safetensors", name)]

    def sealed(self, files: dict[str, WrittenFile]) -> "Manifest":
        """The manifest with its files and its checksum."""
        complete = self.model_copy(update={"files": files})
        return complete.model_copy(update={"sha256": complete.checksum})

    @property
    def checksum(self) -> str:
        """The expected value of `sha256`."""
        # fields added since the first format are omitted at their default
        added = {"data": None, "data_state": None, "processes": 1, "context_parallel": 1, "skipped_steps": 0}
        added["gradient_norms"] = ()
        omitted = {"sha256", *(name for name, default in added.items() if getattr(self, name) == default)}
        return hashlib.sha256(self.model_dump_json(exclude=omitted).encode()).hexdigest()


@dataclass(frozen=True)
class IntactCheckpoint:
    """An intact checkpoint."""

    folder: Path
    manifest: Manifest
    notes: tuple[str, ...]
    """A sentence for each damaged checkpoint that was skipped."""


class Writer:
    """Writes checkpoints asynchronously: chunks are copied to main memory, and a thread writes them, one at a time.

    Leaving the context waits for the last write. A failed write raises at the next wait, on all processes.
    """

    def __init__(self, run: Path, groups: ProcessGroups = ALONE, *, keep: int, keep_best: bool) -> None:
        self.run = run
        self.groups = groups.background
        self.keep = keep
        self.keep_best = keep_best
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Path, Future[None]] | None = None

    def write(self, manifest: Manifest, parts: Parts, metadata: Mapping[str, str]) -> Path:
        """Start to write a checkpoint after the previous one; its folder appears when all processes have written."""
        self.wait()
        copies = {
            # which no later step changes
            part: {name: chunk._replace(values=chunk.values.to("cpu", copy=True)) for name, chunk in chunks.items()}
            for part, chunks in parts.items()
        }
        folder = folder_of(self.run, manifest.step)
        self._pending = folder, self._thread.submit(self._write, manifest, copies, metadata)
        return folder

    def wait(self) -> None:
        """Wait for a pending write; CheckpointError if it failed on any process."""
        if self._pending is None:
            return
        (folder, done), self._pending = self._pending, None
        if error := done.exception():
            raise CheckpointError(f"the checkpoint {folder} could not be written: {error}") from error

    def _write(self, manifest: Manifest, parts: Parts, metadata: Mapping[str, str]) -> None:
        try:
            write(self.run, manifest, parts, metadata, self.groups)
        except Exception:
            if self.groups.is_main:
                delete_unfinished(self.run)  # frees space on a full disk
            raise
        if self.groups.is_main:
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


def write(
    run: Path, manifest: Manifest, parts: Parts, metadata: Mapping[str, str], groups: ProcessGroups = ALONE
) -> Path:
    """Write a checkpoint, a collective call; its folder appears when all in it is flushed to disk.

    Raises:
        SeqmixError: a process cannot write its part.
    """
    folder = folder_of(run, manifest.step)
    files = dict[str, dict[str, Any]]()
    partial = folder.with_name(f".{folder.name}.partial")
    with _failing_together(groups):
        partial.mkdir(parents=True, exist_ok=True)
        for part, chunks in parts.items():
            file = partial / file_of(part, groups)
            if chunks or groups.is_main:  # an optimizer may have no state
                write_chunks(file, chunks, metadata)
                files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        if not groups.is_main:  # which does so at the end
            flush(partial)
    written = {name: WrittenFile(**file) for each in groups.gather(files) for name, file in each.items()}
    with _failing_together(groups):
        if groups.is_main:
            sealed = manifest.sealed(dict(sorted(written.items())))
            (partial / MANIFEST_FILE).write_text(sealed.model_dump_json(indent=2) + "\n")
            for path in (partial / MANIFEST_FILE, partial):
                flush(path)
            _remove(folder)
            partial.rename(folder)
            flush(folder.parent)
    return folder


@contextmanager
def _failing_together(groups: ProcessGroups) -> Iterator[None]:
    """Raise what fails on one process on all of them, whatever it is: none is left waiting."""
    with groups.raise_together():
        try:
            yield
        except SeqmixError:
            raise
        except Exception as error:
            raise CheckpointError(str(error)) from error


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


def file_of(part: str, groups: ProcessGroups = ALONE) -> str:
    """The name of the file that holds what this process has of a part."""
    return f"{part}.safetensors" if groups.size == 1 else f"{part}-{groups.rank + 1}-of-{groups.size}.safetensors"


def find(
    run: Path, which: Choice = "newest", *, parts: tuple[str, ...] | None = None, groups: ProcessGroups = ALONE
) -> IntactCheckpoint:
    """An intact checkpoint: if the newest (or the best) is damaged, the previous one (or the next best).

    `parts` limits which files must be intact; `groups` share the work, in a collective call. CheckpointError: there is
    no checkpoint, or none is intact.
    """
    available = checkpoints(run)
    if not available:
        raise CheckpointError(
            f"{run} holds no checkpoint, so it has no weights: train it with `seqmix train --resume {run}`, or if "
            "convert or average wrote it, write it again"
        )
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
            return IntactCheckpoint(folder, verify(folder, parts, groups), tuple(f"{note}; skipped" for note in notes))
        except CheckpointError as error:
            if not folder.exists():  # a run that trains has deleted it meanwhile, and has newer ones
                return find(run, which, parts=parts, groups=groups)
            notes.append(str(error))
    raise CheckpointError(notes[0] + (f"; the {len(notes) - 1} others are damaged too" if notes[1:] else ""))


def read(run: Path, which: Choice, part: str, use: Callable[[Path], object]) -> IntactCheckpoint:
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


def verify(folder: Path, parts: tuple[str, ...] | None = None, groups: ProcessGroups = ALONE) -> Manifest:
    """The manifest, after all files (or those of `parts`) were checked against it; CheckpointError: one differs."""
    manifest = said = None
    try:
        manifest = read_manifest(folder)
        for part in parts or ():
            if not manifest.files_of(part):
                raise CheckpointError(f"{folder / MANIFEST_FILE} is damaged: it does not name {file_of(part)}")
        named = sorted(manifest.files) if parts is None else [x for part in parts for x in manifest.files_of(part)]
        for name in named[groups.rank :: groups.size]:
            if not re.fullmatch(r"[a-z]+(-\d{1,9}-of-\d{1,9})?\.safetensors", name):  # a path, or what no file can have
                raise CheckpointError(f"{folder / MANIFEST_FILE} is damaged: it names {name!r:.80}")
            _require_intact(folder / name, manifest.files[name])
    except CheckpointError as error:
        said = str(error)
    said = next((each for each in groups.gather(said) if each is not None), None)
    if said is not None or manifest is None:
        raise CheckpointError(said)
    return manifest


def _require_intact(file: Path, written: WrittenFile) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    if (size := file.stat().st_size) != written.bytes:
        raise CheckpointError(f"{file} is damaged: it has {size:,} bytes instead of {written.bytes:,}")
    if _sha256(file) != written.sha256:
        raise CheckpointError(f"{file} is damaged: its checksum does not match")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; CheckpointError: it is missing, damaged, or names another step."""
    file = folder / MANIFEST_FILE
    try:
        manifest = Manifest.model_validate_json(read_bytes(file))
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


def files_of(folder: Path, part: str) -> list[Path]:
    """The files of a part of a checkpoint; that of one process if it has none."""
    return [folder / name for name in read_manifest(folder).files_of(part) or (file_of(part),)]


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
