"""Averages of checkpoints: the mean of the weights of a run's last checkpoints, as a run directory."""

from pathlib import Path

import torch
from torch import Tensor

from ..tensor_files import read_tensors
from . import files as checkpoint
from . import train_state
from .files import CheckpointError
from .run_dir import require_vacant
from .saved_run import read_config, write_run


def average_run(run: Path, out: Path, *, checkpoints: int) -> list[int]:
    """Write the mean of the weights of a run's last checkpoints (Izmailov et al. 2018, arXiv 1803.05407).

    Args:
        run: the run directory.
        out: the new run directory, which evaluates, generates and exports as any other, and cannot be resumed.
        checkpoints: how many, at least 2.

    Returns:
        Their steps.

    Raises:
        SeqmixError: it is not a run, has fewer checkpoints, one is damaged, or the directory cannot be written.
    """
    config = read_config(run)
    found = checkpoint.checkpoints(run)
    if not 2 <= checkpoints <= len(found):
        raise CheckpointError(
            f"--checkpoints is {checkpoints}, which is 2 at least, and {run} holds {len(found)}: "
            "training.keep_checkpoints says how many a run keeps"
        )
    require_vacant(out, "--to")
    last_ones = found[-checkpoints:]
    try:
        steps = [checkpoint.verify(folder, (train_state.MODEL,)).step for folder in last_ones]
        files = [read_tensors(checkpoint.files_of(folder, train_state.MODEL)) for folder in last_ones]
    except CheckpointError:
        if all(folder.exists() for folder in last_ones):
            raise
        # a run that trains has deleted one meanwhile, and has newer ones
        return average_run(run, out, checkpoints=checkpoints)
    last = files[-1][0]
    means = {name: _mean([tensors[name] for tensors, _ in files]) for name in last}
    comment = f"# the mean of the weights after steps {', '.join(map(str, steps))} of {run}\n"
    tokenizer = config.data.tokenizer_of(run)
    vocabulary = None if tokenizer is None else tokenizer.vocabulary
    write_run(out, config, means, step=steps[-1], comment=comment, vocabulary=vocabulary)
    return steps


def _mean(values: list[Tensor]) -> Tensor:
    """The mean; of whole numbers, the last."""
    if not values[-1].is_floating_point():
        return values[-1]
    return torch.stack(values).double().mean(0).to(values[-1].dtype)
