"""Loggers of metrics besides metrics.jsonl: `tensorboard`, `wandb`, or a class given by its path."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from ...registry import SeqmixError, import_object, reason_of, write_file
from ..config import LOGGERS, RunConfig

TENSORBOARD_FOLDER = "tensorboard"
WANDB_ID = Path("wandb", "run-id.txt")
"""File in the run directory with the id of its W&B run, which a resumed run continues."""


class Logger(Protocol):
    """Interface of a class named in `training.loggers`.

    It is instantiated without arguments, and only the main process uses it.
    """

    def begin(self, run: Path, config: RunConfig, step: int) -> None:
        """Start to log a new run, or continue a resumed one.

        Values that were already logged for later steps are obsolete, as these steps run again.

        Args:
            run: the run directory.
            config: the configuration of the run.
            step: number of steps completed; 0 for a new run.
        """

    def record(self, step: int, values: dict[str, float]) -> None:
        """Log one line of metrics.jsonl.

        Args:
            step: number of steps completed.
            values: numbers by name; names of nested values are joined by slashes: "validation_loss_by_length/1024".
        """

    def close(self) -> None:
        """Flush and close. It is always called at the end, also after an error."""


def make_logger(name: str) -> Logger:
    """Create a logger.

    Args:
        name: one of `LOGGERS`, or the path of a class.

    Raises:
        SeqmixError: its package is not installed, or its class cannot be imported or instantiated.
    """
    if name not in LOGGERS:
        factory = import_object(name, "the logger")
        with explain_refusal(name):
            return factory()
    try:
        return {"tensorboard": TensorBoard, "wandb": WandB}[name]()
    except ImportError as error:
        raise SeqmixError(
            f"training.loggers needs the package {name}, which is not installed: pip install {name}"
        ) from error


class GuardedLogger:
    """Logger whose failure stops a run only if it cannot start; later, it just ends the logging, with one warning.

    Args:
        name: one of `LOGGERS`, or the path of a class.

    Raises:
        SeqmixError: the logger cannot be made.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.logger = make_logger(name)
        self.has_failed = False

    def begin(self, run: Path, config: RunConfig, step: int) -> None:
        """Start to log.

        Raises:
            SeqmixError: the logger refuses.
        """
        with explain_refusal(self.name):
            self.logger.begin(run, config, step)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Log one line of metrics.jsonl, unless the logger has failed."""
        if not self.has_failed:
            with self._survive():
                self.logger.record(step, values)

    def close(self) -> None:
        """Flush and close."""
        with self._survive():
            self.logger.close()

    @contextmanager
    def _survive(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any type, also those of the network
            if not self.has_failed:
                self.has_failed = True
                warnings.warn(
                    f"the logger {self.name} has failed and logs no more of this run, which goes on and has all "
                    f"metrics in its metrics.jsonl: {reason_of(error)}",
                    stacklevel=4,
                )


@contextmanager
def explain_refusal(name: str) -> Iterator[None]:
    """Context that turns any error raised while a logger starts into a SeqmixError of one sentence."""
    try:
        yield
    except (SeqmixError, OSError):  # already one sentence, or names the file
        raise
    except Exception as error:
        raise SeqmixError(f"the logger {name} cannot start: {reason_of(error)}") from error


def scalars(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested values with their names joined by slashes; booleans and the step are left out."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            yield f"{prefix}{name}", value


class TensorBoard:
    """Logger to TensorBoard, which writes to RUN/tensorboard."""

    def __init__(self) -> None:
        self._writer_class: Any = import_module("torch.utils.tensorboard").SummaryWriter
        self._writer: Any = None

    def begin(self, run: Path, config: RunConfig, step: int) -> None:  # noqa: ARG002
        """Open the files; steps that run again replace those already logged."""
        self._writer = self._writer_class(str(run / TENSORBOARD_FOLDER), purge_step=step + 1)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Log the numbers of one line of metrics.jsonl."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandB:
    """Logger to Weights and Biases.

    W&B's environment variables configure it: WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_MODE. A resumed run
    continues its W&B run. W&B keeps the first values of steps that run again, which are bitwise equal.
    """

    def __init__(self) -> None:
        self._wandb: Any = import_module("wandb")
        self._run: Any = None

    def begin(self, run: Path, config: RunConfig, step: int) -> None:  # noqa: ARG002
        """Start the W&B run, or continue it.

        Raises:
            SeqmixError: W&B refuses; the message has the reason.
        """
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
                settings=self._wandb.Settings(console="off"),  # the console has a progress bar, no log
            )
        except Exception as error:  # errors of W&B have many types, also those of the network
            reason = " ".join(str(error).split("\n")[:3])  # for an invalid setting, three lines say which and why
            raise SeqmixError(f"W&B cannot start: {reason}; set WANDB_MODE=offline to log without a network") from error

    def record(self, step: int, values: dict[str, float]) -> None:
        """Log the numbers of one line of metrics.jsonl."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()
