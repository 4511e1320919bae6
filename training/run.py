"""The training loop, as a generator of events: start or resume, steps, evaluations, checkpoints, stop.

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
from ..registry import format_duration
from .checkpoint import files as checkpoint
from .checkpoint import train_state
from .checkpoint.code import code_of, read_code, write_code
from .checkpoint.errors import DivergenceError, RunFileError, TrainingError, explain_errors, newest_checkpoint
from .checkpoint.files import Best, CheckpointError, IntactCheckpoint, Manifest
from .checkpoint.provenance import record_session
from .checkpoint.run_dir import CONFIG_FILE, LOCK_FILE, claim_with_rollback, lock_run, require_free
from .checkpoint.status import StatusWriter
from .config import RunConfig, TrainingConfig
from .distributed.process_groups import ProcessGroups, explain_lost_process, join_processes
from .distributed.sharding import assign, reshard, sharder
from .monitoring.events import Compiled, Evaluated, Event, Noted, OutOfTime, Saved, Started, Stepped, StoppedEarly
from .monitoring.memory import peak_memory
from .monitoring.metrics import Measured
from .monitoring.metrics_file import MetricsWriter
from .monitoring.peak_flops import peak_flops
from .nonfinite import NotFiniteError
from .objective import Objective
from .optimizer import build_optimizer
from .precision import precision_of
from .trainer import StepResult, Trainer
from .warm_start import WeightsOrigin, start_from


def train(
    config: RunConfig,
    run: str | Path,
    *,
    resume: bool = False,
    stop: Callable[[], bool] = lambda: False,
    device: torch.device | str | None = None,
    objective: Objective | None = None,
) -> Iterator[Event]:
    """Train a model, and yield events. Training advances as the generator is iterated.

    Args:
        config: the configuration of the run, from `load_config`.
        run: the run directory. A new run creates it, and refuses one that is not empty.
        resume: True to continue the run from its newest intact checkpoint, or from the start if it has none.
        stop: called after every step; if it returns True, a checkpoint is written and the run ends.
        device: the device to train on; None for a GPU if there is one, else the CPU. With several processes it must be
            None: each one takes its own GPU.
        objective: the loss to minimise; cross-entropy when None.

    Raises:
        SeqmixError: the directory, the data or a checkpoint cannot be used, the model cannot be built, the loss is NaN
            or infinite, or a checkpoint cannot be written. Nothing is written before all inputs are loaded.
    """
    if not isinstance(config, RunConfig):
        raise TrainingError(f"train expects a RunConfig from load_config, got {config!r:.100}")
    run = Path(run)
    began = time.monotonic()
    with join_processes(config.distributed) as groups, ExitStack() as lock, ExitStack() as starting:
        if resume:  # locked before reading checkpoints, which another process may be deleting
            with groups.raise_together():
                if groups.is_main:
                    lock.enter_context(_lock_resumed_run(run))
        source, model, saved, origin = _load_inputs(config, run, resume, groups, device)
        if objective is not None:
            objective.prepare(model)
        optimizer = build_optimizer(model, config.training)
        loop = TrainingLoop(Trainer(config, source, model, optimizer, groups, objective), run, began)
        device = model.device
        precision = loop.trainer.precision
        start = 0
        notes = [*config.training.shortening_notes, *([] if origin is None else [origin.note])]
        with groups.raise_together():
            if saved is not None:
                start = saved.manifest.step
                notes = [*notes, *saved.notes, *loop.restore(saved)]
            elif not resume and groups.is_main:
                kernels = "".join(f", {name}: {backend}" for name, backend in model.backends.items())
                starting.enter_context(
                    claim_with_rollback(
                        run, config, f"# kernels on {device} in {precision}{kernels}\n" if kernels else ""
                    )
                )
                lock.enter_context(lock_run(run))
            if groups.is_main and source.tokenizer is not None and not (run / TOKENIZER_FILE).exists():
                source.tokenizer.save(run)  # also on resume, if the run was killed before this line
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), ExitStack() as stack:
            stack.enter_context(loop.status.recording())
            stack.enter_context(explain_lost_process(groups.rank))
            stack.enter_context(explain_errors(run, config.training))
            with groups.raise_together():
                if groups.is_main:
                    loop.metrics_writer.begin(start)
                    checkpoint.delete_unfinished(run)
                    if (code := code_of(config)) != read_code(run):
                        write_code(run, code)
                    record_session(
                        run,
                        config,
                        step=start,
                        device=device,
                        precision=precision,
                        groups=groups,
                        start_from=None if origin is None else origin.provenance,
                    )
            starting.close()  # from here on, the run can be resumed
            loop.status.begin(start)
            stack.callback(loop.metrics_writer.close)
            stack.enter_context(loop.writer)
            yield Started(source, sum(p.numel() for p in model.parameters()), device, precision, start, groups.size)
            for text in notes:
                yield Noted(start, text)
            yield from loop.steps(start, stop)


class TrainingLoop:
    """Loop over the steps of a run, with its evaluations and checkpoints.

    Args:
        trainer: makes the steps and evaluations.
        run: the run directory.
        began: time of `time.monotonic` from which training.max_time is counted; None for now.
    """

    def __init__(self, trainer: Trainer, run: Path, began: float | None = None) -> None:
        self.trainer = trainer
        self.run = run
        self.config = trainer.config
        self.groups = trainer.groups
        settings = self.config.training
        model = trainer.model
        self.metrics_writer = MetricsWriter(run, self.config)
        self.writer = checkpoint.Writer(run, self.groups, keep=settings.keep_checkpoints, keep_best=settings.keep_best)
        self.status = StatusWriter(run, settings.steps, active=self.groups.is_main)
        self.best = Best()
        began = time.monotonic() if began is None else began
        self.end = math.inf if settings.max_time is None else began + settings.max_time
        """Time of `time.monotonic` at which the time budget is spent."""
        self.done = 0
        """Number of steps completed, including the current one."""
        self.peak = peak_flops(model.device, trainer.precision)
        # the backward pass has two matrix products for each one in the forward pass
        self.flops_per_token = 3 * flops_per_token(model, self.config.data.sequence_length)

    def restore(self, saved: IntactCheckpoint) -> list[str]:
        """Resume from a checkpoint; return one sentence for each difference from an uninterrupted run."""
        trainer = self.trainer
        manifest = saved.manifest
        if not manifest.files_of(train_state.OPTIMIZER):
            raise TrainingError(_missing_optimizer_message(self.run))
        changed = train_state.load_model(saved.folder, trainer.model)
        train_state.load_optimizer(saved.folder, trainer.model, trainer.optimizer)
        if self.config.training.carry_state:
            batch_size = self.config.training.batch_size
            trainer.state = train_state.load_state(saved.folder, trainer.model, batch_size, self.groups)
        if manifest.data_state is not None:
            trainer.source.load_state_dict(manifest.data_state)
        if trainer.ema is not None:
            train_state.load_ema(saved.folder, trainer.model, trainer.ema)
        self.best = manifest.best
        trainer.skipping.skipped = manifest.skipped_steps
        trainer.skipping.norms.extend(manifest.gradient_norms)
        # masks of the library's own dropout do not depend on the layout
        modules = (module for module in trainer.model.modules() if module not in trainer.dropouts)
        has_layout_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules)
        return _resume_notes(manifest, trainer, changed, self.groups, has_layout_dropout)

    def steps(self, start: int, stop: Callable[[], bool]) -> Iterator[Event]:
        """Run all steps from `start` on, with evaluations and checkpoints, until a stop request or early stopping."""
        settings = self.config.training
        first_step_seconds = 0.0
        if self._out_of_patience:
            yield self._stop_early(start)
            return
        try:
            for step in range(start, settings.steps):
                self.done = done = step + 1
                began = time.perf_counter()
                result = self.trainer.train_step(step)
                seconds = time.perf_counter() - began
                if step == start:
                    first_step_seconds = seconds
                elif settings.compile and step == start + 1:
                    yield Compiled(done, first_step_seconds - seconds, len(set(self.config.model.layers)))
                event = self._step_event(result, seconds)
                is_last = done == settings.steps
                if done % settings.log_every == 0 or is_last:
                    self._record(asdict(event))
                self.status.update(step=done, loss=event.loss if math.isfinite(event.loss) else None)
                yield event
                if result.skipped is not None:
                    yield Noted(done, f"step {done} is skipped: {result.skipped}")
                metrics = {"loss": result.loss}
                if is_last or done % settings.evaluate_every == 0:
                    metrics["validation_loss"] = yield from self._evaluate(is_last=is_last)
                stop_requested = self.groups.any(stop())
                stops_early = self._out_of_patience and not is_last
                out_of_time = not (is_last or stops_early or stop_requested) and self._is_out_of_time()
                if out_of_time and "validation_loss" not in metrics:
                    measured = self.trainer.evaluate()  # not for `best`, so that a resumed run is an uninterrupted one
                    yield self._record_evaluation(measured, final=False)
                run_ends = is_last or stops_early or stop_requested or out_of_time
                keeps_best = settings.keep_best and self.best.step == done
                if run_ends or keeps_best or done % settings.checkpoint_every == 0:
                    # an evaluation checked the parameters too, but not a carried state
                    was_evaluated = "validation_loss" in metrics and not settings.carry_state
                    if not (was_evaluated and self.trainer.parameters_are_finite()):
                        self.trainer.require_finite_update(step)
                    yield self.save(done, metrics, wait=run_ends)
                if stops_early:
                    yield self._stop_early(done)
                elif stop_requested and not is_last:
                    self.status.outcome = "interrupted", "a signal or the program asked the run to stop"
                elif out_of_time:
                    yield self._stop_at_budget(done)
                if run_ends:
                    return
        except NotFiniteError as error:
            with suppress(CheckpointError):
                self.writer.wait()
            message = f"step {self.done}: {error}; try a lower training.learning_rate; {newest_checkpoint(self.run)}"
            with self.groups.raise_together():
                raise DivergenceError(message) from None
        except RuntimeError as error:
            error.add_note(f"step {self.done}: ")  # `join_processes` reads it if another process does not answer
            raise

    def save(self, step: int, metrics: dict[str, float], *, wait: bool = False) -> Saved:
        """Start to write a checkpoint.

        Args:
            step: number of steps completed.
            metrics: metrics of the last step, for the manifest.
            wait: True to wait until the checkpoint is complete.

        Raises:
            CheckpointError: this checkpoint or the previous one could not be written.
        """
        trainer = self.trainer
        groups = self.groups
        source = trainer.source
        best = self.best
        manifest = Manifest(
            step=step,
            processes=groups.size,
            context_parallel=groups.context_parallel,
            precision=str(trainer.precision).removeprefix("torch."),
            metrics=metrics,
            best=best,
            data=source.digest,
            data_state=trainer.loader.state_dict(),
            skipped_steps=trainer.skipping.skipped,
            gradient_norms=tuple(trainer.skipping.norms),
        )
        reshard(trainer.model)
        parts = train_state.local_parts(trainer.model, trainer.optimizer, trainer.state, trainer.ema, groups)
        with groups.raise_together():
            vocabulary = None if source.tokenizer is None else source.tokenizer.vocabulary
            self.writer.write(manifest, parts, train_state.metadata_of(self.config.model, step, vocabulary))
        with groups.raise_together():
            if wait:
                self.writer.wait()
        return Saved(step, checkpoint.folder_of(self.run, step))

    def _record(self, values: dict[str, Any]) -> None:
        if self.groups.is_main:
            self.metrics_writer.record(values)

    def _step_event(self, result: StepResult, seconds: float) -> Stepped:
        speed = self.config.training.batch_size * self.config.data.sequence_length / seconds
        mfu = None if self.peak is None else self.flops_per_token * speed / (self.peak * self.groups.size)
        memory = peak_memory(self.trainer.model.device)
        loss, norm, rate, violation, _ = result
        skipped = self.trainer.skipping.skipped if self.trainer.skipping.enabled else None
        return Stepped(self.done, loss, rate, norm, speed, mfu, violation, memory, skipped)

    def _evaluate(self, *, is_last: bool) -> Generator[Evaluated, None, float]:
        """Evaluate after a step, and make the final evaluation if training ends here.

        Returns:
            The loss over training.evaluation_batches batches, which is comparable between evaluations.
        """
        settings = self.config.training
        evaluate = self.trainer.evaluate
        result = final_result = evaluate(final=is_last)
        if is_last and settings.final_evaluation_batches != settings.evaluation_batches:
            result = evaluate(final=False)
        self.best = self.best.after(self.done, result.loss)
        if not is_last:
            yield self._record_evaluation(result, final=False)
            if self._out_of_patience:
                is_last = True
                final_result = evaluate(final=True)
        if is_last:
            yield self._record_evaluation(final_result, final=True)
        return result.loss

    def _record_evaluation(self, measured: Measured, *, final: bool) -> Evaluated:
        """Evaluate at training.evaluation_lengths too, record all metrics, and return the event."""
        lengths = self.config.training.evaluation_lengths
        trained_length = self.config.data.sequence_length
        measured_at = {length: self.trainer.evaluate(final=final, length=length) for length in lengths}
        by_length = {length: each.loss for length, each in measured_at.items()}
        # the loss by position is that of the longest sequences
        longest = max(lengths, default=0)
        positions = measured_at[longest].loss_by.get("position") if longest > trained_length else None
        loss_by = measured.loss_by | ({"position": positions} if positions else {})
        values = {
            "step": self.done,
            "validation_loss": measured.loss,
            "validation_tokens": measured.n_targets,
            "final": final,
        }
        values |= {"validation_loss_by_length": by_length} if by_length else {}
        values |= {"validation_loss_by": loss_by} if loss_by else {}
        if measured.accuracy is not None:
            values |= {"accuracy": measured.accuracy, "accuracy_by": measured.accuracy_by}
        self._record(values)
        self.status.update(step=self.done, validation_loss=measured.loss, at_once=True)
        return Evaluated(
            self.done,
            measured.loss,
            final,
            by_length,
            measured.accuracy,
            measured.accuracy_by,
            loss_by,
            tokens=measured.n_targets,
        )

    @property
    def _out_of_patience(self) -> bool:
        patience = self.config.training.patience
        return patience is not None and self.best.evaluations_since >= patience

    def _stop_early(self, done: int) -> StoppedEarly:
        self.status.outcome = "finished", f"stopped early: no evaluation was better than that of step {self.best.step}"
        return StoppedEarly(done, self.best.step, math.nan if self.best.loss is None else self.best.loss)

    def _is_out_of_time(self) -> bool:
        """Return True if the time budget is spent on any process."""
        return self.end < math.inf and self.groups.any(time.monotonic() >= self.end)

    def _stop_at_budget(self, done: int) -> OutOfTime:
        budget = self.config.training.max_time or 0.0
        self.status.outcome = "stopped", f"the time budget of {format_duration(budget)} is spent"
        return OutOfTime(done, budget)


def _load_inputs(
    config: RunConfig, run: Path, resume: bool, groups: ProcessGroups, requested_device: torch.device | str | None
) -> tuple[Source, LanguageModel, IntactCheckpoint | None, WeightsOrigin | None]:
    """Load all inputs of a run, without writing anything.

    Returns:
        The data, the model (sharded over the processes), the checkpoint to resume from, and the origin of the weights
        with training.start_from. The last two may be None.
    """
    origin = None
    device = torch.device(requested_device or ("cuda" if torch.cuda.is_available() else "cpu"))
    saved = None
    with groups.raise_together():
        if requested_device is not None and groups.size > 1:
            raise TrainingError(
                f"expected no device, since each of the {groups.size} processes uses its own GPU, or the CPU, got "
                f"{requested_device}: leave it out"
            )
        if not resume and groups.is_main:
            require_free(run)
        settings = config.training
        ranks = groups.dp_size
        if settings.batch_size % (ranks * settings.grad_accum_steps):
            raise TrainingError(
                f"expected training.batch_size to be a multiple of {ranks * settings.grad_accum_steps} ({ranks} "
                f"data-parallel ranks, data x shard, times training.grad_accum_steps = {settings.grad_accum_steps}), "
                f"got {settings.batch_size}"
            )
        source = config.open_data(run)
    with groups.raise_together():
        if resume and groups.any(bool(checkpoint.checkpoints(run))):
            saved = checkpoint.find(run, groups=groups)
        _require_context_parallel_mixers(build_meta(config.model), settings, groups)
        shard = sharder(groups, config.distributed)  # after the checks, as making the mesh is a collective call
        precision = precision_of(settings, device)
        model = build_model(
            config.model, device=device, activations=precision, seed=config.seed, shard=shard, assign=assign
        )
        model.tokenizer = source.tokenizer
        model.set_cp_group(groups.cp_group)
        if saved is None and settings.start_from is not None:
            origin = start_from(Path(settings.start_from), model, source.tokenizer)
    return source, model, saved, origin


@contextmanager
def _lock_resumed_run(run: Path) -> Iterator[None]:
    """Lock a run to resume it.

    Raises:
        TrainingError: it is not a run directory, or was not written by training: it had no lock file, and has no
            weights or no optimizer state.
    """
    if not (run / CONFIG_FILE).is_file():
        raise RunFileError(f"{run} is not a run directory: it has no {CONFIG_FILE}; `seqmix train` writes one")
    had_lock = (run / LOCK_FILE).exists()
    with lock_run(run):
        try:
            if not had_lock:
                _require_resumable(run)
        except TrainingError:
            (run / LOCK_FILE).unlink(missing_ok=True)
            raise
        yield


def _require_resumable(run: Path) -> None:
    if not (folders := checkpoint.checkpoints(run)):
        raise RunFileError(
            f"{run} has a configuration but no weights, and was not written by `seqmix train`: write it again with "
            "`seqmix convert` or `seqmix average`, or train new weights with "
            f"`seqmix train {run / CONFIG_FILE} --out DIR`"
        )
    with suppress(CheckpointError):  # a damaged checkpoint is reported when it is loaded
        if not checkpoint.read_manifest(folders[-1]).files_of(train_state.OPTIMIZER):
            raise TrainingError(_missing_optimizer_message(run))


def _missing_optimizer_message(run: Path) -> str:
    return (
        f"{run} has weights but no optimizer state, as a result of `seqmix convert` or `seqmix average`: start a new "
        f"run from these weights with training.start_from={run}"
    )


def _require_context_parallel_mixers(model: LanguageModel, settings: TrainingConfig, groups: ProcessGroups) -> None:
    """Raise TrainingError if a mixer does not work with the configured context parallelism."""
    for name, block in zip(model.config.layers, model.blocks, strict=True) if groups.cp_group is not None else ():
        mixer = block.mixer
        setting = f"distributed.context_parallel = {groups.context_parallel}"
        if mixer.supports_context_parallel:
            continue
        if settings.compile:
            raise TrainingError(
                f"{setting} passes the state of {mixer.kind} (model.blocks.{name}) from process to process, which "
                "cannot be compiled: set training.compile to false"
            )
        if mixer.traits.state == "growing":
            raise TrainingError(
                f"{setting} is not supported by {mixer.kind} of model.blocks.{name}: its state grows with the text, "
                "and its `mix` does not read `call.cp_group`; set distributed.context_parallel to 1, or change the "
                "mixer"
            )


def _resume_notes(
    manifest: Manifest, trainer: Trainer, changed_fields: list[str], groups: ProcessGroups, has_layout_dropout: bool
) -> list[str]:
    """Return one sentence for each difference from an uninterrupted run: in rounding, dropout masks and data.

    Args:
        manifest: the manifest of the checkpoint.
        trainer: the trainer of the resumed run.
        changed_fields: phrases on implementation fields that changed.
        groups: the processes.
        has_layout_dropout: True if the model has dropout whose masks depend on the layout of the processes.
    """
    current: dict[str, object] = {"processes": groups.size, "context_parallel": groups.context_parallel}
    previous: dict[str, object] = {name: getattr(manifest, name) for name in current}
    masks_differ = has_layout_dropout and current != previous
    current |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    previous |= {"threads": manifest.threads, "torch": manifest.torch}
    if manifest.precision is not None:
        current["precision"] = str(trainer.precision).removeprefix("torch.")
        previous["precision"] = manifest.precision
    changed = [
        f"{name} {previous[name]} before and {current[name]} from here on"
        for name in current
        if current[name] != previous[name]
    ]
    notes = []
    if changed := [*changed, *changed_fields]:
        notes.append(
            f"{', '.join(changed)}: results may differ from an uninterrupted run by rounding, which training amplifies"
        )
    if masks_differ:
        notes.append(
            "dropout masks differ from those of the previous number of processes, as with another seed: the weights "
            "will differ by a few percent from those of an uninterrupted run"
        )
    source = trainer.source
    if manifest.data is not None and manifest.data != source.digest:
        notes.append(
            f"{source.name} differs from the training data up to step {manifest.step}: the run continues on other data"
        )
    return notes
