"""Checkpoints: directories that are written atomically and verified by checksum. Nothing is ever unpickled.

RUN/checkpoints/step-000500/model.safetensors        parameters
RUN/checkpoints/step-000500/optimizer.safetensors    the optimizer's state (moments)
RUN/checkpoints/step-000500/state.safetensors        the recurrent state, with training.carry_state
RUN/checkpoints/step-000500/manifest.json            written last: versions, and the size and checksum of each file

With several processes, each one writes its own chunks, to model-1-of-2.safetensors and so on. On loading, each one
reads the chunks that it needs, from a checkpoint of any number of processes. Both layouts can be read by
`HuggingFaceStorageReader` of torch's distributed checkpoint.
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

from ...registry import Config, SeqmixError, flush, nearest_hint, read_bytes
from ..distributed.process_groups import ALONE, ProcessGroups
from ..tensor_files import CheckpointError, Chunk, write_chunks
from .provenance import seqmix_version

MANIFEST_FILE = "manifest.json"

Parts = Mapping[str, Mapping[str, Chunk]]
"""Chunks of one process, by part of the checkpoint ("model", "optimizer", "state", "ema") and name of the tensor."""

Choice = int | Literal["newest", "best"]
"""A choice of a run's checkpoint: a step, the newest, or the best, which has the lowest validation loss."""


class Best(Config):
    """The best evaluation so far."""

    loss: float | None = None
    """Validation loss of the best evaluation, in nats per token; None before the first evaluation."""
    step: int = 0
    """Step of the best evaluation; 0 before the first evaluation."""
    evaluations_since: int = 0
    """Number of evaluations since the best one."""

    def after(self, step: int, loss: float) -> "Best":
        """Return the best evaluation so far, given a further one at `step` with this loss."""
        if self.loss is None or loss < self.loss:
            return Best(loss=loss, step=step)
        return Best(loss=self.loss, step=self.step, evaluations_since=self.evaluations_since + 1)


class WrittenFile(Config):
    """Size and checksum of a file as it was written."""

    bytes: int
    """Size in bytes."""
    sha256: str
    """SHA-256 of the contents, in hexadecimal."""


class Manifest(Config):
    """Contents of `manifest.json`, which describes a checkpoint."""

    step: int
    """Number of steps completed."""
    seqmix: str = Field(default_factory=seqmix_version)
    """Version of seqmix that wrote the checkpoint."""
    torch: str = str(torch.__version__)
    """Version of torch that computed the checkpoint."""
    threads: int = Field(default_factory=get_num_threads)
    """Number of threads during training, which affects the rounding of sums."""
    processes: int = 1
    """Number of processes during training, which affects the rounding of sums."""
    context_parallel: int = 1
    """Number of processes that shared each sequence."""
    precision: str | None = None
    """Dtype of matrix products during training; None in a checkpoint of an older version."""
    metrics: dict[str, float]
    """Metrics after this step; `validation_loss` only if this step was evaluated."""
    best: Best
    """Best evaluation up to this step."""
    data: str | None = None
    """Hash of the training data; None for a task, or in a checkpoint of an older version."""
    data_state: dict[str, Any] | None = None
    """Position in streamed data; None if batches are a function of seed and step alone."""
    skipped_steps: int = 0
    """Number of steps skipped so far."""
    gradient_norms: tuple[float, ...] = Field(default=(), strict=False)
    """Gradient norms of the last steps; empty without training.max_grad_norm_spike."""
    files: dict[str, WrittenFile] = Field(default_factory=dict)
    """Size and checksum of each file, by name."""
    sha256: str = ""
    """SHA-256 of this manifest, as JSON without this field."""

    def files_of(self, part: str) -> list[str]:
        """Return the file names of a part, such as "model"."""
        return [name for name in self.files if re.fullmatch(rf"{part}(-\d+-of-\d+)?\.safetensors", name)]

    def seal(self, files: dict[str, WrittenFile]) -> "Manifest":
        """Return a copy of the manifest with these files and with its checksum."""
        complete = self.model_copy(update={"files": files})
        return complete.model_copy(update={"sha256": complete.checksum})

    @property
    def checksum(self) -> str:
        """Expected value of `sha256`: the SHA-256 of all other fields."""
        # fields that older formats lack are omitted at their default, so that old checksums stay valid
        added = {
            "data": None,
            "data_state": None,
            "processes": 1,
            "context_parallel": 1,
            "precision": None,
            "skipped_steps": 0,
            "gradient_norms": (),
        }
        omitted = {"sha256", *(name for name, default in added.items() if getattr(self, name) == default)}
        return hashlib.sha256(self.model_dump_json(exclude=omitted).encode()).hexdigest()


@dataclass(frozen=True)
class IntactCheckpoint:
    """A checkpoint whose files were verified."""

    folder: Path
    """Folder of the checkpoint."""
    manifest: Manifest
    """Manifest of the checkpoint."""
    notes: tuple[str, ...]
    """One sentence for each damaged checkpoint that was skipped."""


class Writer:
    """Asynchronous writer of checkpoints: it copies chunks to main memory, and a thread writes them to disk.

    One checkpoint is written at a time. Leaving the context waits for the last write. A failed write raises at the next
    wait, on all processes.

    Args:
        run: the run directory.
        groups: the processes of the run.
        keep: number of newest checkpoints to keep.
        keep_best: True to keep the best checkpoint as well.
    """

    def __init__(self, run: Path, groups: ProcessGroups = ALONE, *, keep: int, keep_best: bool) -> None:
        self.run = run
        self.groups = groups.background
        self.keep = keep
        self.keep_best = keep_best
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Path, Future[None]] | None = None

    def write(self, manifest: Manifest, parts: Parts, metadata: Mapping[str, str]) -> Path:
        """Wait for the previous checkpoint, and start to write one.

        Its folder appears when all processes have written their parts.

        Returns:
            The folder.

        Raises:
            CheckpointError: the previous checkpoint could not be written.
        """
        self.wait()
        copies = {
            # copied, as the next step changes the parameters
            part: {name: chunk._replace(values=chunk.values.to("cpu", copy=True)) for name, chunk in chunks.items()}
            for part, chunks in parts.items()
        }
        folder = folder_of(self.run, manifest.step)
        self._pending = folder, self._thread.submit(self._write, manifest, copies, metadata)
        return folder

    def wait(self) -> None:
        """Wait for a pending write.

        Raises:
            CheckpointError: the write failed on some process.
        """
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
            if kind is None:  # otherwise the error in the context is reported
                raise
        finally:
            self._thread.shutdown()


def write(
    run: Path, manifest: Manifest, parts: Parts, metadata: Mapping[str, str], groups: ProcessGroups = ALONE
) -> Path:
    """Write a checkpoint, as a collective call. Its folder appears once all files are flushed to disk.

    Args:
        run: the run directory.
        manifest: the manifest, still without files and checksum.
        parts: the chunks of this process.
        metadata: the metadata of each safetensors file.
        groups: the processes.

    Returns:
        The folder.

    Raises:
        SeqmixError: a process cannot write its part.
    """
    folder = folder_of(run, manifest.step)
    files = dict[str, dict[str, Any]]()
    partial = folder.with_name(f".{folder.name}.partial")
    with _raise_any_error_together(groups):
        partial.mkdir(parents=True, exist_ok=True)
        for part, chunks in parts.items():
            file = partial / file_of(part, groups)
            if chunks or groups.is_main:  # an optimizer may have no state
                write_chunks(file, chunks, metadata)
                files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        if not groups.is_main:  # the main process flushes it at the end
            flush(partial)
    written = {name: WrittenFile(**file) for each in groups.gather(files) for name, file in each.items()}
    with _raise_any_error_together(groups):
        if groups.is_main:
            sealed = manifest.seal(dict(sorted(written.items())))
            (partial / MANIFEST_FILE).write_text(sealed.model_dump_json(indent=2) + "\n")
            for path in (partial / MANIFEST_FILE, partial):
                flush(path)
            _remove(folder)
            partial.rename(folder)
            flush(folder.parent)
    return folder


@contextmanager
def _raise_any_error_together(groups: ProcessGroups) -> Iterator[None]:
    """Context that raises any error of one process on all processes, so that none waits for ever."""
    with groups.raise_together():
        try:
            yield
        except SeqmixError:
            raise
        except Exception as error:
            raise CheckpointError(str(error)) from error


def delete_others(run: Path, step: int, *, keep: int, keep_best: bool) -> None:
    """Delete a run's checkpoints except for the newest `keep` of those up to `step`, and, if `keep_best`, the best."""
    retained = [folder for folder in checkpoints(run) if step_of(folder) <= step][-keep:]
    if keep_best:
        retained += _by_loss(run)[:1]
    for folder in checkpoints(run):
        if folder not in retained:
            _remove(folder)


def delete_unfinished(run: Path) -> None:
    """Delete checkpoints that a killed process left half written or half deleted."""
    for folder in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(folder)


def checkpoints(run: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, oldest first; they may be damaged (see `verify`)."""
    folders = (f for f in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", f.name) and f.is_dir())
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def file_of(part: str, groups: ProcessGroups = ALONE) -> str:
    """Return the name of this process's file of a part."""
    return f"{part}.safetensors" if groups.size == 1 else f"{part}-{groups.rank + 1}-of-{groups.size}.safetensors"


def find(
    run: Path, which: Choice = "newest", *, parts: tuple[str, ...] | None = None, groups: ProcessGroups = ALONE
) -> IntactCheckpoint:
    """Find an intact checkpoint. If the newest (or the best) is damaged, the previous one (or the next best) is taken.

    Args:
        run: the run directory.
        which: the checkpoint: a step, "newest" or "best".
        parts: the parts whose files must be intact; all when None.
        groups: the processes, which share the work in a collective call.

    Raises:
        CheckpointError: there is no such checkpoint, or none is intact.
    """
    available = checkpoints(run)
    if not available:
        raise CheckpointError(
            f"{run} has no checkpoint, and so no weights: train it with `seqmix train --resume {run}`; if `seqmix "
            "convert` or `seqmix average` wrote it, run that command again"
        )
    if isinstance(which, int):
        candidates = [folder for folder in available if step_of(folder) == which]
    elif which not in (names := ("newest", "best")):
        raise CheckpointError(
            f"expected a checkpoint: newest, best or a step, got {which!r}{nearest_hint(which, names)}"
        )
    else:
        candidates = available[::-1] if which == "newest" else _by_loss(run)
    if not candidates:
        missing = "evaluated checkpoint" if which == "best" else f"checkpoint of step {which}"
        steps = ", ".join(str(step_of(folder)) for folder in available)
        raise CheckpointError(f"{run} has no {missing}; it has checkpoints of steps {steps}")
    notes: list[str] = []
    for folder in candidates:
        try:
            return IntactCheckpoint(folder, verify(folder, parts, groups), tuple(f"{note}; skipped" for note in notes))
        except CheckpointError as error:
            if not folder.exists():  # a training process deleted it meanwhile, and has written newer ones
                return find(run, which, parts=parts, groups=groups)
            notes.append(str(error))
    raise CheckpointError(
        notes[0] + (f"; all other checkpoints ({len(notes) - 1}) are damaged too" if notes[1:] else "")
    )


def read(run: Path, which: Choice, part: str, use: Callable[[Path], object]) -> IntactCheckpoint:
    """Find a checkpoint with an intact part, and call `use` with its folder.

    If a training process deletes the checkpoint meanwhile, the next one is used.

    Args:
        run: the run directory.
        which: the checkpoint, as in `find`.
        part: the part that must be intact.
        use: reads the folder; raises CheckpointError if it cannot.
    """
    while True:
        checkpoint = find(run, which, parts=(part,))
        try:
            use(checkpoint.folder)
        except CheckpointError:
            if checkpoint.folder.exists():
                raise
        else:
            return checkpoint


def verify(folder: Path, parts: tuple[str, ...] | None = None, groups: ProcessGroups = ALONE) -> Manifest:
    """Check the files of a checkpoint against its manifest.

    Args:
        folder: the checkpoint.
        parts: the parts to check; all files when None.
        groups: the processes, which share the work in a collective call.

    Returns:
        The manifest.

    Raises:
        CheckpointError: the manifest or a file is missing or damaged.
    """
    manifest = problem = None
    try:
        manifest = read_manifest(folder)
        for part in parts or ():
            if not manifest.files_of(part):
                raise CheckpointError(f"{folder / MANIFEST_FILE} is damaged: it does not list {file_of(part)}")
        names = sorted(manifest.files) if parts is None else [x for part in parts for x in manifest.files_of(part)]
        for name in names[groups.rank :: groups.size]:
            # anything else could be a path out of the folder, or no valid file name
            if not re.fullmatch(r"[a-z]+(-\d{1,9}-of-\d{1,9})?\.safetensors", name):
                raise CheckpointError(
                    f"{folder / MANIFEST_FILE} is damaged: it lists {name!r:.80}, which is not a name of a checkpoint "
                    "file"
                )
            _require_intact(folder / name, manifest.files[name])
    except CheckpointError as error:
        problem = str(error)
    problem = next((each for each in groups.gather(problem) if each is not None), None)
    if problem is not None or manifest is None:
        raise CheckpointError(problem)
    return manifest


def _require_intact(file: Path, written: WrittenFile) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    if (size := file.stat().st_size) != written.bytes:
        raise CheckpointError(f"{file} is damaged: it has {size:,} bytes instead of {written.bytes:,}")
    if _sha256(file) != written.sha256:
        raise CheckpointError(f"{file} is damaged: its checksum does not match")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or of another step than the folder.
    """
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
        raise CheckpointError(f"{file} is damaged: expected step {step_of(folder)}, got {manifest.step}")
    return manifest


def files_of(folder: Path, part: str) -> list[Path]:
    """Return the files of a part of a checkpoint.

    If the manifest lists none, this is the path that a run with a single process would have written.
    """
    return [folder / name for name in read_manifest(folder).files_of(part) or (file_of(part),)]


def folder_of(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:06d}"


def _by_loss(run: Path) -> list[Path]:
    """Return the evaluated checkpoints, best first; of equal losses, the oldest first."""
    losses: dict[Path, float] = {}
    for folder in checkpoints(run):
        with suppress(CheckpointError, KeyError):
            losses[folder] = read_manifest(folder).metrics["validation_loss"]
    return sorted(losses, key=lambda folder: losses[folder])


def _remove(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a half deleted one is never visible under its name."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.deleted")
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
