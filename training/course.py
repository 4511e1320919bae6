"""A run's course: when it steps, evaluates, keeps a checkpoint and stops; a generator of events.

What processes do together, all do in the same order; the first one alone writes files.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from ..data import Source
from ..mixers.state import map_state
from ..models import flops_per_token
from . import checkpoint
from . import train_state as snapshot
from .checkpoint import Best, Found, Manifest
from .errors import TrainingError, kept
from .events import Compiled, Evaluated, Event, Saved, Stepped, StoppedEarly
from .logging import Metrics
from .memory import peak_memory
from .metrics import Measured
from .nonfinite import NotFiniteError
from .peak_flops import peak_flops
from .provenance import seqmix_version
from .ranks import Ranks
from .sharding import settle, take_part
from .trainer import Learner, StepResult


class Trainer:
    """A learner with its run's folder; as a context, it waits for the last checkpoint."""

    def __init__(self, learner: Learner, run: Path) -> None:
        self.learner, self.run = learner, run
        self.config, self.ranks = learner.config, learner.ranks
        settings, model = self.config.training, learner.model
        self.metrics = Metrics(run, tensorboard=settings.tensorboard)
        self.writer = checkpoint.Writer(run, keep=settings.keep_checkpoints, keep_best=settings.keep_best)
        self.best = Best()
        self.peak = peak_flops(model.device, learner.precision)
        # a product has two in backward
        self.flops_per_token = 3 * flops_per_token(model, self.config.data.sequence_length)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.metrics.close()
        self.writer.__exit__(kind, error, trace)

    def restore(self, found: Found) -> list[str]:
        """Go on from a checkpoint.

        Returns:
            What makes the run another one than it would have been, a sentence each.

        Raises:
            CheckpointError: it is of another model, optimizer or batch.
        """
        learner = self.learner
        changed = snapshot.load_model(found.folder, learner.model)
        snapshot.load_optimizer(found.folder, learner.model, learner.optimizer)
        if self.config.training.carry_state:
            state = snapshot.load_state(found.folder, learner.model, self.config.training.batch_size)
            first = self.ranks.batch_rank * learner.rows
            learner.state = map_state(lambda leaf: leaf[first : first + learner.rows].clone(), state)
        self.best = found.manifest.best
        return _differences(found.manifest, learner.source, changed, self.ranks)

    def steps(self, start: int, stop: Callable[[], bool]) -> Iterator[Event]:
        """All steps from `start` on, with evaluations and checkpoints, until asked to stop, or no longer better."""
        settings = self.config.training
        first: float | None = None
        if self._out_of_patience:
            yield self._stopped_early(start)
            return
        for step in range(start, settings.steps):
            began = time.perf_counter()
            with self._finite(step + 1):
                result = self.learner.step(step)
            seconds = time.perf_counter() - began
            done = step + 1
            if settings.compile and first is None:
                first = seconds
            elif settings.compile and step == start + 1 and first is not None:
                yield Compiled(done, first - seconds, len(set(self.config.model.layers)))
            stepped = self._stepped(done, result, seconds)
            last = done == settings.steps
            if done % settings.log_every == 0 or last:
                self._record(asdict(stepped))
            yield stepped
            measured = {"loss": result.loss}
            if last or done % settings.evaluate_every == 0:
                measured["validation_loss"] = yield from self._evaluations(done, last=last)
            stopping = self.ranks.any(stop())
            early = self._out_of_patience and not last
            best = settings.keep_best and self.best.step == done
            if last or early or stopping or best or done % settings.checkpoint_every == 0:
                with self._finite(done):
                    self.learner.require_good(step)
                yield self.save(done, measured, wait=last or early or stopping)
            if early:
                yield self._stopped_early(done)
            if early or stopping:
                return

    def save(self, step: int, metrics: dict[str, float], *, wait: bool = False) -> Saved:
        """Begin to write a checkpoint behind `step` steps.

        Raises:
            CheckpointError: it, or the one before, could not be written.
        """
        manifest = Manifest(
            step=step,
            seqmix=seqmix_version(),
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            processes=self.ranks.size,
            metrics=metrics,
            best=self.best,
            data=self.learner.source.digest,
        )
        model, state = self.learner.model, self.learner.state
        settle(model)
        whole = None if state is None else map_state(self.ranks.rows, state)
        parts = snapshot.gather(model, self.learner.optimizer, whole)
        with self.ranks.together():
            self.writer.wait()
        if self.ranks.first:
            self.writer.write(manifest, parts, snapshot.metadata_of(self.config.model, step))
        else:
            take_part(parts)
        with self.ranks.together():
            if wait:
                self.writer.wait()
        return Saved(step, checkpoint.folder_of(self.run, step))

    def _record(self, values: dict[str, Any]) -> None:
        if self.ranks.first:
            self.metrics.record(values)

    def _stepped(self, done: int, result: StepResult, seconds: float) -> Stepped:
        speed = self.config.training.batch_size * self.config.data.sequence_length / seconds
        return Stepped(
            done,
            result.loss,
            learning_rate=result.learning_rate,
            gradient_norm=result.gradient_norm,
            tokens_per_second=speed,
            mfu=None if self.peak is None else self.flops_per_token * speed / (self.peak * self.ranks.size),
            memory_bytes=peak_memory(self.learner.model.device),
        )

    def _evaluations(self, done: int, *, last: bool) -> Generator[Evaluated, None, float]:
        """The evaluation behind a step, and the final one if training ends with it.

        Returns:
            The loss that is compared with those of other evaluations: of as many batches, also at the end.
        """
        settings = self.config.training
        found = at_end = self._measured(done, final=last)
        if last and settings.final_evaluation_batches != settings.evaluation_batches:
            found = self._measured(done, final=False)
        self.best = self.best.after(done, found.loss)
        if not last:
            yield self._evaluated(done, found, final=False)
            if self._out_of_patience:
                last, at_end = True, self._measured(done, final=True)
        if last:
            yield self._evaluated(done, at_end, final=True)
        return found.loss

    def _evaluated(self, done: int, found: Measured, *, final: bool) -> Evaluated:
        """An evaluation on record, with the further lengths."""
        lengths = self.config.training.evaluation_lengths
        by_length = {length: self._measured(done, final=final, length=length).loss for length in lengths}
        values = {"step": done, "validation_loss": found.loss, "final": final}
        if by_length:
            values["validation_loss_by_length"] = by_length
        if found.accuracy is not None:
            values |= {"accuracy": found.accuracy, "accuracy_by": found.accuracy_by}
        self._record(values)
        return Evaluated(done, found.loss, final, by_length, found.accuracy, found.accuracy_by)

    def _measured(self, done: int, *, final: bool, length: int | None = None) -> Measured:
        with self._finite(done):
            return self.learner.evaluate(final=final, length=length)

    @property
    def _out_of_patience(self) -> bool:
        patience = self.config.training.patience
        return patience is not None and self.best.evaluations_since >= patience

    def _stopped_early(self, done: int) -> StoppedEarly:
        return StoppedEarly(done, self.best.step, math.nan if self.best.loss is None else self.best.loss)

    @contextmanager
    def _finite(self, done: int) -> Iterator[None]:
        """Tell of a value that is not finite what is kept, and what may help."""
        try:
            yield
        except NotFiniteError as error:
            with suppress(checkpoint.CheckpointError):
                self.writer.wait()
            said = TrainingError(f"step {done}: {error}; try a lower training.learning_rate; {kept(self.run)}")
            raise self.ranks.alike(said) from None


def _differences(manifest: Manifest, source: Source, ways: list[str], ranks: Ranks) -> list[str]:
    """What makes a resumed run another one: by its data, or by rounding."""
    now = {"processes": ranks.size, "threads": torch.get_num_threads(), "torch": torch.__version__}
    then = {"processes": manifest.processes, "threads": manifest.threads, "torch": manifest.torch}
    changed = [f"{what} {then[what]} before and {now[what]} from here on" for what in now if now[what] != then[what]]
    notes = [f"{', '.join([*changed, *ways])}: other last bits than an undisturbed run"] if changed or ways else []
    if manifest.data is not None and manifest.data != source.digest:
        notes.append(
            f"{source.name} is not the text that was learned up to step {manifest.step}: from here on another run"
        )
    return notes
