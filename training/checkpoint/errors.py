"""Explanations of errors during a run (memory, disk, compiler), with the newest checkpoint and how to resume."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...models import compiler_failure, is_out_of_memory
from ...registry import DataError, OutOfMemoryError, SeqmixError
from ..config import TrainingConfig
from .files import checkpoints


class TrainingError(SeqmixError):
    """Training cannot start or continue."""


class RunFileError(TrainingError, DataError):
    """A file of a run is missing or unreadable, or cannot be written."""


class DivergenceError(TrainingError):
    """Training diverged: the loss, a gradient or a parameter is NaN or infinite."""

    exit_status = 4


class TrainingMemoryError(TrainingError, OutOfMemoryError):
    """Training needs more memory than there is."""


@contextmanager
def explain_errors(run: Path, settings: TrainingConfig) -> Iterator[None]:
    """Context that turns an out-of-memory error, a failed compilation or a file error into a one-line TrainingError."""
    try:
        yield
    except OSError as error:
        # the error for a full disk names no file
        file = error.filename or run
        raise RunFileError(
            f"{file} cannot be read or written: {error.strerror or error}; {newest_checkpoint(run)}"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if (reason := compiler_failure(error)) is not None:
            raise TrainingError(
                f"torch.compile failed ({reason}): set training.compile to false in {run / 'config.yaml'}, "
                f"and resume with --resume {run}; {newest_checkpoint(run)}"
            ) from None
        if not is_out_of_memory(error):
            raise
        match = re.search(r"allocate (?:(\d+) bytes|([\d.]+ [KMGT]iB))", str(error))
        size = f" (tried to allocate {match[2] or f'{int(match[1]) / 2**30:.1f} GiB'})" if match else ""
        remedies = [
            f"lower training.batch_size ({settings.batch_size})",
            f"raise training.grad_accum_steps ({settings.grad_accum_steps}), for smaller micro-batches",
            *([] if settings.activation_checkpointing else ["set training.activation_checkpointing to true"]),
        ]
        raise TrainingMemoryError(
            f"out of memory{size}: {', '.join(remedies[:-1])}, or {remedies[-1]}; {newest_checkpoint(run)}"
        ) from None  # the traceback would keep the tensors alive


def newest_checkpoint(run: Path) -> str:
    """Return the last clause of an error message, which names the newest checkpoint of a run."""
    folders = checkpoints(run)
    return f"the newest checkpoint is {folders[-1]}" if folders else "no checkpoint was written yet"
