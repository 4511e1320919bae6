"""The course of a run: start or resume, steps, evaluations, checkpoints, stop; a generator of events.

All processes make their collective calls in the same order; only the main one writes files.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Source
from ..models import TOKENIZER_FILE, LanguageModel, build_meta, build_model, flops_per_token
from .checkpoint import files as checkpoint
from .checkpoint import train_state
from .checkpoint.errors import TrainingError, explain_errors, newest_checkpoint
from .checkpoint.files import Best, CheckpointError, IntactCheckpoint, Manifest
from .checkpoint.provenance import record_session
from .checkpoint.run_dir import CONFIG_FILE, LOCK_FILE, claimed, held, require_free
from .config import RunConfig, TrainingConfig
from .distributed.process_groups import ProcessGroups, join_processes
from .distributed.sharding import assign, reshard, sharder
from .monitoring.events import Compiled, Evaluated, Event, Noted, Saved, Started, Stepped, StoppedEarly
from .monitoring.logging import Metrics
from .monitoring.memory import peak_memory
from .monitoring.metrics import Measured
from .monitoring.peak_flops import peak_flops
from .nonfinite import NotFiniteError
from .objective import Objective
from .optimizer import build_optimizer
from .precision import precision_of
from .start import Beginning, start_from
from .trainer import StepResult, Trainer


def train(
    config: RunConfig,
    run: str | Path,
    *,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    device: torch.device | str | None = None,
    objective: Objective | None = None,
) -> Iterator[Event]:
    """Train a model: a generator of events, which trains as it is iterated.

    Args:
        config: the run.
        run: the run directory; created, and refused if it is not empty, unless resumed.
        resume: whether to continue from its newest intact checkpoint (from the start, if there is none).
        stop: called after every step; true writes a checkpoint and ends the run.
        device: where it trains; None for a GPU if there is one. Several processes choose theirs by rank.
        objective: what it minimises; the cross-entropy when None.

    Raises:
        SeqmixError: the directory, the data or a checkpoint cannot be used, the model cannot be built, the loss is NaN
            or infinite, or a checkpoint cannot be written. Nothing is written before all inputs are loaded.
    """
    if not isinstance(config, RunConfig):
        raise TrainingError(f"train takes a RunConfig, from load_config, and was given {config!r:.100}")
    run = Path(run)
    with join_processes(config.distributed) as groups, ExitStack() as lock, ExitStack() as starting:
        if resume:  # before checkpoints are read, which another process may be rotating
            with groups.raise_together():
                if groups.is_main:
                    lock.enter_context(_resumed(run))
        source, model, found, begun = _open(config, run, resume, groups, device)
        if objective is not None:
            objective.prepare(model)
        optimizer = build_optimizer(model, config.training)
        course = Course(Trainer(config, source, model, optimizer, groups, objective), run)
        device = model.device
        precision = course.trainer.precision
        start = 0
        notes = [*config.training.shortened, *([] if begun is None else [begun.note])]
        with groups.raise_together():
            if found is not None:
                start = found.manifest.step
                notes = [*notes, *found.notes, *course.restore(found)]
            elif not resume and groups.is_main:
                kernels = "".join(f", {name}: {backend}" for name, backend in model.backends.items())
                starting.enter_context(
                    claimed(run, config, f"# kernels on {device} in {precision}{kernels}\n" if kernels else "")
                )
                lock.enter_context(held(run))
            if groups.is_main and source.tokenizer is not None and not (run / TOKENIZER_FILE).exists():
                source.tokenizer.save(run)  # resumed, a run that was killed before this gets it too
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), ExitStack() as stack:
            stack.enter_context(explain_errors(run, config.training))
            with groups.raise_together():
                if groups.is_main:
                    course.metrics.begin(start)
                    checkpoint.delete_unfinished(run)
                    origin = None if begun is None else begun.provenance
                    record_session(
                        run, config, step=start, device=device, precision=precision, groups=groups, start_from=origin
                    )
            starting.close()  # from here on, the run can be resumed
            stack.callback(course.metrics.close)
            stack.enter_context(course.writer)
            yield Started(source, sum(p.numel() for p in model.parameters()), device, precision, start, groups.size)
            for text in notes:
                yield Noted(start, text)
            yield from course.steps(start, stop)


class Course:
    """A trainer with its run directory."""

    def __init__(self, trainer: Trainer, run: Path) -> None:
        self.trainer = trainer
        self.run = run
        self.config = trainer.config
        self.groups = trainer.groups
        settings = self.config.training
        model = trainer.model
        self.metrics = Metrics(run, self.config)
        self.writer = checkpoint.Writer(run, self.groups, keep=settings.keep_checkpoints, keep_best=settings.keep_best)
        self.best = Best()
        self.done = 0
        """Steps completed, including the current one."""
        self.peak = peak_flops(model.device, trainer.precision)
        # each matrix product has two more in the backward pass
        self.flops_per_token = 3 * flops_per_token(model, self.config.data.sequence_length)

    def restore(self, found: IntactCheckpoint) -> list[str]:
        """Resume from a checkpoint; returns a sentence for each difference from an uninterrupted run."""
        trainer = self.trainer
        if not found.manifest.files_of(train_state.OPTIMIZER):
            raise TrainingError(_without_optimizer(self.run))
        changed = train_state.load_model(found.folder, trainer.model)
        train_state.load_optimizer(found.folder, trainer.model, trainer.optimizer)
        if self.config.training.carry_state:
            batch_size = self.config.training.batch_size
            trainer.state = train_state.load_state(found.folder, trainer.model, batch_size, self.groups)
        if found.manifest.data_state is not None:
            trainer.source.load_state_dict(found.manifest.data_state)
        if trainer.ema is not None:
            train_state.load_ema(found.folder, trainer.model, trainer.ema)
        self.best = found.manifest.best
        trainer.skipping.skipped = found.manifest.skipped_steps
        trainer.skipping.norms.extend(found.manifest.gradient_norms)
        modules = (module for module in trainer.model.modules() if module not in trainer.dropouts)
        dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules)
        return _differences(found.manifest, trainer.source, changed, self.groups, dropout)

    def steps(self, start: int, stop: Callable[[], bool]) -> Iterator[Event]:
        """All steps from `start` on, with evaluations and checkpoints, until a stop request or early stopping."""
        settings = self.config.training
        first = 0.0
        if self._out_of_patience:
            yield self._stopped_early(start)
            return
        try:
            for step in range(start, settings.steps):
                self.done = done = step + 1
                began = time.perf_counter()
                result = self.trainer.train_step(step)
                seconds = time.perf_counter() - began
                if step == start:
                    first = seconds
                elif settings.compile and step == start + 1:
                    yield Compiled(done, first - seconds, len(set(self.config.model.layers)))
                stepped = self._stepped(result, seconds)
                last = done == settings.steps
                if done % settings.log_every == 0 or last:
                    self._record(asdict(stepped))
                yield stepped
                if result.skipped is not None:
                    yield Noted(done, f"step {done} is skipped: {result.skipped}")
                measured = {"loss": result.loss}
                if last or done % settings.evaluate_every == 0:
                    measured["validation_loss"] = yield from self._evaluations(last=last)
                stopping = self.groups.any(stop())
                early = self._out_of_patience and not last
                ending = last or early or stopping
                best = settings.keep_best and self.best.step == done
                if ending or best or done % settings.checkpoint_every == 0:
                    # an evaluation is a check too, but for what only training reads
                    evaluated = "validation_loss" in measured and not settings.carry_state
                    if not (evaluated and self.trainer.parameters_are_finite()):
                        self.trainer.require_finite_update(step)
                    yield self.save(done, measured, wait=ending)
                if early:
                    yield self._stopped_early(done)
                if early or stopping:
                    return
        except NotFiniteError as error:
            with suppress(CheckpointError):
                self.writer.wait()
            said = f"step {self.done}: {error}; try a lower training.learning_rate; {newest_checkpoint(self.run)}"
            with self.groups.raise_together():
                raise TrainingError(said) from None
        except RuntimeError as error:
            error.add_note(f"step {self.done}: ")  # for `join_processes`, where a process does not answer
            raise

    def save(self, step: int, metrics: dict[str, float], *, wait: bool = False) -> Saved:
        """Start to write a checkpoint after `step` steps; CheckpointError: it, or the previous one, failed."""
        trainer = self.trainer
        groups = self.groups
        source = trainer.source
        best = self.best
        manifest = Manifest(
            step=step,
            processes=groups.size,
            context_parallel=groups.context_parallel,
            metrics=metrics,
            best=best,
            data=source.digest,
            data_state=trainer.loader.state_dict(),
            skipped_steps=trainer.skipping.skipped,
            gradient_norms=tuple(trainer.skipping.norms),
        )
        reshard(trainer.model)
        parts = train_state.own_parts(trainer.model, trainer.optimizer, trainer.state, trainer.ema, groups)
        with groups.raise_together():
            self.writer.write(manifest, parts, train_state.metadata_of(self.config.model, step))
        with groups.raise_together():
            if wait:
                self.writer.wait()
        return Saved(step, checkpoint.folder_of(self.run, step))

    def _record(self, values: dict[str, Any]) -> None:
        if self.groups.is_main:
            self.metrics.record(values)

    def _stepped(self, result: StepResult, seconds: float) -> Stepped:
        speed = self.config.training.batch_size * self.config.data.sequence_length / seconds
        mfu = None if self.peak is None else self.flops_per_token * speed / (self.peak * self.groups.size)
        memory = peak_memory(self.trainer.model.device)
        loss, norm, rate, violation, _ = result
        skipped = self.trainer.skipping.skipped if self.trainer.skipping.enabled else None
        return Stepped(self.done, loss, rate, norm, speed, mfu, violation, memory, skipped)

    def _evaluations(self, *, last: bool) -> Generator[Evaluated, None, float]:
        """The evaluation after a step, and the final one if training ends with it.

        Returns the loss to compare with other evaluations: always over the same number of batches.
        """
        settings = self.config.training
        evaluate = self.trainer.evaluate
        found = at_end = evaluate(final=last)
        if last and settings.final_evaluation_batches != settings.evaluation_batches:
            found = evaluate(final=False)
        self.best = self.best.after(self.done, found.loss)
        if not last:
            yield self._evaluated(found, final=False)
            if self._out_of_patience:
                last = True
                at_end = evaluate(final=True)
        if last:
            yield self._evaluated(at_end, final=True)
        return found.loss

    def _evaluated(self, found: Measured, *, final: bool) -> Evaluated:
        """Record an evaluation, with the further lengths."""
        lengths = self.config.training.evaluation_lengths
        trained = self.config.data.sequence_length
        longer = {length: self.trainer.evaluate(final=final, length=length) for length in lengths}
        by_length = {length: each.loss for length, each in longer.items()}
        # positions of the longest sequences
        positions = longer[max(longer)].loss_by.get("position") if longer and max(longer) > trained else None
        loss_by = found.loss_by | ({"position": positions} if positions else {})
        values = {"step": self.done, "validation_loss": found.loss, "final": final}
        values |= {"validation_loss_by_length": by_length} if by_length else {}
        values |= {"validation_loss_by": loss_by} if loss_by else {}
        if found.accuracy is not None:
            values |= {"accuracy": found.accuracy, "accuracy_by": found.accuracy_by}
        self._record(values)
        return Evaluated(self.done, found.loss, final, by_length, found.accuracy, found.accuracy_by, loss_by)

    @property
    def _out_of_patience(self) -> bool:
        patience = self.config.training.patience
        return patience is not None and self.best.evaluations_since >= patience

    def _stopped_early(self, done: int) -> StoppedEarly:
        return StoppedEarly(done, self.best.step, math.nan if self.best.loss is None else self.best.loss)


def _open(
    config: RunConfig, run: Path, resume: bool, groups: ProcessGroups, given: torch.device | str | None
) -> tuple[Source, LanguageModel, IntactCheckpoint | None, Beginning | None]:
    """The data, the model, sharded over the processes, the checkpoint to resume from, or where else its weights came
    from; nothing is written."""
    begun = None
    device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = None
    with groups.raise_together():
        if given is not None and groups.size > 1:
            raise TrainingError("several processes choose their devices by rank: leave out the device")
        if not resume and groups.is_main:
            require_free(run)
        settings = config.training
        shares = groups.dp_size
        if settings.batch_size % (shares * settings.grad_accum_steps):
            raise TrainingError(
                f"training.batch_size = {settings.batch_size} must be a multiple of {shares} data-parallel ranks "
                f"(data x shard) times training.grad_accum_steps = {settings.grad_accum_steps}, which is "
                f"{shares * settings.grad_accum_steps}"
            )
        source = config.open_data(run)
    with groups.raise_together():
        if resume and groups.any(bool(checkpoint.checkpoints(run))):
            found = checkpoint.find(run, groups=groups)
        _require_shared_mixers(build_meta(config.model), settings, groups)
        shard = sharder(groups, config.distributed)  # after the checks: the processes meet to make the mesh
        precision = precision_of(settings, device)
        model = build_model(
            config.model, device=device, activations=precision, seed=config.seed, shard=shard, assign=assign
        )
        model.tokenizer = source.tokenizer
        model.set_cp_group(groups.cp_group)
        if found is None and settings.start_from is not None:
            begun = start_from(Path(settings.start_from), model, source.tokenizer)
    return source, model, found, begun


@contextmanager
def _resumed(run: Path) -> Iterator[None]:
    """Lock a run that is resumed; refuse one that training has not written: it had no lock, and has no weights, or no
    optimizer's state."""
    if not (run / CONFIG_FILE).is_file():
        raise TrainingError(f"{run} is not a run directory: it has no {CONFIG_FILE}")
    had_lock = (run / LOCK_FILE).exists()
    with held(run):
        try:
            if not had_lock:
                _require_trained(run)
        except TrainingError:
            (run / LOCK_FILE).unlink(missing_ok=True)
            raise
        yield


def _require_trained(run: Path) -> None:
    if not (folders := checkpoint.checkpoints(run)):
        raise TrainingError(
            f"{run} has a configuration and no weights, and was not written by `seqmix train`: write it again, by "
            f"convert or average, or train new weights by `seqmix train {run / CONFIG_FILE} --out DIR`"
        )
    with suppress(CheckpointError):  # damaged, which is said where it is read
        if not checkpoint.read_manifest(folders[-1]).files_of(train_state.OPTIMIZER):
            raise TrainingError(_without_optimizer(run))


def _without_optimizer(run: Path) -> str:
    return (
        f"{run} has weights without an optimizer's state, as convert and average write them: start a new run from "
        f"them, by training.start_from={run}"
    )


def _require_shared_mixers(model: LanguageModel, settings: TrainingConfig, groups: ProcessGroups) -> None:
    """Refuse a mixer that does not support context parallelism."""
    for name, block in zip(model.config.layers, model.blocks, strict=True) if groups.cp_group is not None else ():
        mixer = block.mixer
        given = f"distributed.context_parallel = {groups.context_parallel}"
        if mixer.supports_context_parallel:
            continue
        if settings.compile:
            raise TrainingError(
                f"{given} passes the state of {mixer.kind} (model.blocks.{name}) from process to process, which cannot "
                "be compiled: set training.compile to false"
            )
        if mixer.traits.state == "growing":
            raise TrainingError(
                f"{given} is not supported by {mixer.kind} of model.blocks.{name}: its state grows with the text, and "
                "its `mix` does not read `call.cp_group`; set distributed.context_parallel to 1, or change the mixer"
            )


def _differences(
    manifest: Manifest, source: Source, ways: list[str], groups: ProcessGroups, dropout: bool
) -> list[str]:
    """Differences of a resumed run from an uninterrupted one: its data, or rounding."""
    now = {"processes": groups.size, "context_parallel": groups.context_parallel}
    then = {name: getattr(manifest, name) for name in now}
    other_masks = dropout and now != then
    now |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    then |= {"threads": manifest.threads, "torch": manifest.torch}
    changed = [f"{what} {then[what]} before and {now[what]} from here on" for what in now if now[what] != then[what]]
    notes = []
    if changed := [*changed, *ways]:
        how = "by rounding, which training amplifies"
        notes.append(f"{', '.join(changed)}: results may differ from an uninterrupted run {how}")
    if other_masks:
        notes.append("another layout draws other dropout masks, as another seed would: weights differ by percents")
    if manifest.data is not None and manifest.data != source.digest:
        notes.append(
            f"{source.name} differs from the training data up to step {manifest.step}: the run continues on other data"
        )
    return notes
