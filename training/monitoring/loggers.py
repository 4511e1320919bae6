"""Loggers: where metrics go besides metrics.jsonl, by name (`tensorboard`, `wandb`) or by the path of a class."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from ...registry import SeqmixError, import_object, write_file
from ..config import LOGGERS, RunConfig

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID = Path("wandb", "run-id.txt")
"""In a run's folder: the id of its W&B run, which a resumed run continues."""


class Logger(Protocol):
    """What a class named in `training.loggers` has; it is made without arguments, and used by the main process only."""

    def begin(self, run: Path, config: RunConfig, step: int) -> None:
        """Start to log a run, or go on after a number of steps: what was logged of later ones is obsolete.

        Args:
            run: the run directory.
            config: what is trained, and how.
            step: steps completed; 0 for a new run.
        """

    def record(self, step: int, values: dict[str, float]) -> None:
        """Log numbers by name; a line of metrics.jsonl, its mappings flattened: "validation_loss_by_length/1024"."""

    def close(self) -> None:
        """Flush and close; called however the run ends."""


def make_logger(name: str) -> Logger:
    """The logger of a name.

    Raises:
        SeqmixError: its package is not installed, or its module cannot be loaded or used.
    """
    if name not in LOGGERS:
        made = import_object(name, "the logger")
        with explain_refusal(name):
            return made()
    try:
        return {"tensorboard": TensorBoard, "wandb": WandB}[name]()
    except ImportError as error:
        raise SeqmixError(
            f"training.loggers needs the package {name}, which is not installed: pip install 'seqmix[{name}]'"
        ) from error


@contextmanager
def explain_refusal(name: str) -> Iterator[None]:
    """Turn whatever a logger raises as it starts into a sentence."""
    try:
        yield
    except (SeqmixError, OSError):  # a file's error names it
        raise
    except Exception as error:
        raise SeqmixError(
            f"the logger {name} cannot start: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def scalars(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a measurement by path, without booleans."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            yield f"{prefix}{name}", value


class TensorBoard:
    """TensorBoard's files, in RUN/tensorboard."""

    def __init__(self) -> None:
        self._open: Any = import_module("torch.utils.tensorboard").SummaryWriter
        self._board: Any = None

    def begin(self, run: Path, config: RunConfig, step: int) -> None:  # noqa: ARG002
        """Open the files; steps that run again replace those in them."""
        self._board = self._open(str(run / TENSORBOARD_FOLDER), purge_step=step + 1)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Append the numbers."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._board.close()


class WandB:
    """Weights and Biases. W&B's own variables configure it: WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_MODE.

    A resumed run continues its W&B run. Steps that run again have the same numbers to the bit, and W&B keeps the first.
    """

    def __init__(self) -> None:
        self._wandb: Any = import_module("wandb")
        self._run: Any = None

    def begin(self, run: Path, config: RunConfig, step: int) -> None:  # noqa: ARG002
        """Start the W&B run, or continue it; SeqmixError: W&B refuses, with its reason."""
        file = run / WANDB_ID
        if not file.exists():
            write_file(uuid4().hex[:8] + "\n", file)
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "seqmix"),
                dir=str(run),
                id=file.read_text().strip(),
                name=run.absolute().name,
                config=config.model_dump(mode="json"),
                resume="allow",
                settings=self._wandb.Settings(console="off"),  # a progress bar is not a log
            )
        except Exception as error:  # of W&B, or of the network
            reason = " ".join(str(error).split("\n")[:3])  # of a setting: that it is wrong, which, and why
            raise SeqmixError(f"W&B cannot start: {reason}; with WANDB_MODE=offline it needs no network") from error

    def record(self, step: int, values: dict[str, float]) -> None:
        """Log the numbers."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()
