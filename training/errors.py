"""What ends a run in the middle, in one sentence that says what is kept of it and how to go on."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..models import compiler_failure, is_out_of_memory
from ..registry import SeqmixError
from .checkpoint import checkpoints
from .config import TrainingConfig


class TrainingError(SeqmixError):
    """Training cannot start or go on."""


@contextmanager
def explain_errors(run: Path, settings: TrainingConfig) -> Iterator[None]:
    """Explain in one sentence what the machine refuses while a run goes on: memory, a compiler, its files."""
    try:
        yield
    except OSError as error:
        # an error that a full disk gives in the middle of a file has no name
        file = error.filename or run
        raise TrainingError(
            f"{file} cannot be read or written: {error.strerror or error}; {newest_checkpoint(run)}"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if (reason := compiler_failure(error)) is not None:
            raise TrainingError(
                f"training.compile: the compiler has failed ({reason}): set it to false in {run / 'config.yaml'}, "
                f"and go on with --resume {run}; {newest_checkpoint(run)}"
            ) from None
        if not is_out_of_memory(error):
            raise
        found = re.search(r"allocate (?:(\d+) bytes|([\d.]+ [KMGT]iB))", str(error))
        asked = f" ({found[2] or f'{int(found[1]) / 2**30:.1f} GiB'} more were asked for)" if found else ""
        ways = [
            f"lower training.batch_size ({settings.batch_size})",
            f"raise training.grad_accum_steps ({settings.grad_accum_steps}), for smaller micro-batches",
            *([] if settings.activation_checkpointing else ["set training.activation_checkpointing to true"]),
        ]
        raise TrainingError(
            f"memory ran out{asked}: {', '.join(ways[:-1])}, or {ways[-1]}; {newest_checkpoint(run)}"
        ) from None  # what led here holds on to the tensors that took the memory


def newest_checkpoint(run: Path) -> str:
    """What is there to go on from, as the end of a sentence."""
    there = checkpoints(run)
    return f"the newest checkpoint is {there[-1]}" if there else "no checkpoint was written yet"
