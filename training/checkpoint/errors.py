"""Errors of the machine during a run, with the newest checkpoint and how to resume."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...models import compiler_failure, is_out_of_memory
from ...registry import SeqmixError
from ..config import TrainingConfig
from .files import checkpoints


class TrainingError(SeqmixError):
    """Training cannot start or continue."""


@contextmanager
def explain_errors(run: Path, settings: TrainingConfig) -> Iterator[None]:
    """Turn errors of memory, the compiler and files during a run into one sentence."""
    try:
        yield
    except OSError as error:
        # on a full disk, the error names no file
        file = error.filename or run
        raise TrainingError(
            f"{file} cannot be read or written: {error.strerror or error}; {newest_checkpoint(run)}"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if (reason := compiler_failure(error)) is not None:
            raise TrainingError(
                f"training.compile: the compiler failed ({reason}): set it to false in {run / 'config.yaml'}, "
                f"and resume with --resume {run}; {newest_checkpoint(run)}"
            ) from None
        if not is_out_of_memory(error):
            raise
        found = re.search(r"allocate (?:(\d+) bytes|([\d.]+ [KMGT]iB))", str(error))
        asked = f" (tried to allocate {found[2] or f'{int(found[1]) / 2**30:.1f} GiB'})" if found else ""
        ways = [
            f"lower training.batch_size ({settings.batch_size})",
            f"raise training.grad_accum_steps ({settings.grad_accum_steps}), for smaller micro-batches",
            *([] if settings.activation_checkpointing else ["set training.activation_checkpointing to true"]),
        ]
        raise TrainingError(
            f"out of memory{asked}: {', '.join(ways[:-1])}, or {ways[-1]}; {newest_checkpoint(run)}"
        ) from None  # the traceback would keep the tensors alive


def newest_checkpoint(run: Path) -> str:
    """The newest checkpoint to resume from, as the end of a sentence."""
    written = checkpoints(run)
    return f"the newest checkpoint is {written[-1]}" if written else "no checkpoint was written yet"
