"""Averages of a run's last checkpoints, written as a run directory."""

from pathlib import Path

import torch
from torch import Tensor

from ..tensor_files import read_tensors
from . import files as checkpoint
from . import train_state
from .files import CheckpointError
from .run_dir import require_vacant
from .saved_run import read_config, write_run


def average_run(run: Path, out: Path, *, checkpoints: int, trust: bool = False) -> list[int]:
    """Write the mean of the weights of a run's last checkpoints (Izmailov et al. 2018, arXiv 1803.05407).

    Args:
        run: the run directory.
        out: the new run directory. It evaluates, generates and exports like any other, but cannot be resumed.
        checkpoints: number of last checkpoints to average, at least 2.
        trust: as in `load_run`.

    Returns:
        The steps of the averaged checkpoints.

    Raises:
        SeqmixError: `run` is not a run directory, has too few checkpoints, or one is damaged; or `out` cannot be
            written.
    """
    config = read_config(run, trust=trust)
    available = checkpoint.checkpoints(run)
    if not 2 <= checkpoints <= len(available):
        raise CheckpointError(
            f"expected --checkpoints to be at least 2, and not more than {run} has ({len(available)}), got "
            f"{checkpoints}: raise training.keep_checkpoints to keep more of them"
        )
    require_vacant(out)
    newest = available[-checkpoints:]
    try:
        steps = [checkpoint.verify(folder, (train_state.MODEL,)).step for folder in newest]
        files = [read_tensors(checkpoint.files_of(folder, train_state.MODEL)) for folder in newest]
    except CheckpointError:
        if all(folder.exists() for folder in newest):
            raise
        # a training process has deleted a checkpoint meanwhile, and written newer ones
        return average_run(run, out, checkpoints=checkpoints, trust=trust)
    last = files[-1][0]
    means = {name: _mean([tensors[name] for tensors, _ in files]) for name in last}
    comment = f"# the mean of the weights after steps {', '.join(map(str, steps))} of {run}\n"
    tokenizer = config.data.tokenizer_of(run)
    train_state.require_same_tokenizer(newest[-1], files[-1][1], tokenizer)
    vocabulary = None if tokenizer is None else tokenizer.vocabulary
    write_run(out, config, means, step=steps[-1], comment=comment, vocabulary=vocabulary)
    return steps


def _mean(values: list[Tensor]) -> Tensor:
    """Return the mean of floating-point tensors, or the last of integer tensors."""
    if not values[-1].is_floating_point():
        return values[-1]
    return torch.stack(values).double().mean(0).to(values[-1].dtype)
