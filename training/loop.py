"""The training loop: a generator of events, which whoever shows them consumes; on many processes, one on each.

What processes do together, all do in the same order; the first one alone writes files. Everything random in a step is
a function of (seed, step), and of the process: a resumed run goes on as the unbroken one would have.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from ..mixers.state import concatenate, detach, map_state
from ..models import IGNORED, LanguageModel, ModelState, build_model, compile_blocks, flops_per_token
from ..registry import ElsewhereError, SeqmixError, dump
from . import checkpoint, snapshot
from .checkpoint import Best, Found, Manifest
from .config import RunConfig, TrainingConfig
from .data import Batch, Examples, Source
from .diagnosis import first_gradient, first_module
from .events import Compiled, Evaluated, Event, Noted, Saved, Started, Stepped, StoppedEarly
from .failures import TrainingError, kept, told
from .memory import peak_memory
from .metrics import Metrics
from .optim import AnyOptimizer, build_optimizer, learning_rate
from .peaks import peak_flops
from .ranks import ALONE, Group, Ranks, lost
from .score import Measured, Score
from .session import record_session, seqmix_version
from .sharding import settle, shard, take_part, whole

CONFIG_FILE = "config.yaml"


class StepResult(NamedTuple):
    """What one optimizer step gives."""

    loss: float
    """Nats a token, before the step."""
    gradient_norm: float
    """Before it was clipped."""
    learning_rate: float


def train(
    config: RunConfig, run: str | Path, *, resume: bool = False, stop: Callable[[], bool] = lambda: False
) -> Iterator[Event]:
    """Train a model, event by event: it trains as it is iterated.

    Args:
        config: the run.
        run: its folder; made, and refused where it holds something already, unless resumed.
        resume: whether to go on from the newest intact checkpoint in it (from the start, where none was written).
        stop: asked behind every step; true writes a checkpoint and ends.

    Raises:
        SeqmixError: the folder, the text or a checkpoint cannot be used, the model cannot be built, the loss is no
            longer finite, or a checkpoint cannot be written. Nothing is written before all that is needed is there.
    """
    run = Path(run)
    with Group(config.distributed) as ranks:
        try:
            yield from _train(config, run, resume, stop, ranks)
        except RuntimeError as error:
            if ranks.size > 1 and lost(error):
                raise ElsewhereError("another process of the run is gone") from error
            raise


def _train(
    config: RunConfig, run: Path, resume: bool, stop: Callable[[], bool], ranks: Ranks
) -> Generator[Event, None, None]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, written = _precision(config.training, device), None
    with ranks.together():
        if not resume and ranks.first:
            _require_free(run)
        _require_shares(config, ranks)
        source = config.data.open(config, run)
        if resume and ranks.first and checkpoint.checkpoints(run):
            written = checkpoint.find(run)
        model = build_model(config.model, device=device, activations=precision, seed=config.seed)
        model.tokenizer = source.tokenizer
        _require_shared_mixers(model, config.training, ranks)
    # the first process has read it wholly; the others take its word
    folder = ranks.gather(None if written is None else str(written.folder))[0]
    with ranks.together():
        found = written
        if folder is not None and not ranks.first:
            found = Found(Path(folder), checkpoint.read_manifest(Path(folder)), ())
    shard(model, ranks)
    trainer = Trainer(config, run, source, model, build_optimizer(model, config.training), ranks)
    start, notes = 0, []
    with ranks.together():
        if found is not None:
            start, notes = found.manifest.step, [*found.notes, *trainer.restore(found)]
        elif not resume and ranks.first:
            kernels = "".join(f", {name}: {backend}" for name, backend in model.backends.items())
            _claim(run, config, f"# kernels on {device} in {precision}{kernels}\n" if kernels else "")
            if source.tokenizer is not None:
                source.tokenizer.save(run)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), ExitStack() as held:
        held.enter_context(told(run, config.training))
        with ranks.together():
            if ranks.first:
                held.enter_context(_held(run))
                trainer.metrics.begin(start)
                checkpoint.drop_unfinished(run)
                record_session(run, config, step=start, device=device, precision=precision, ranks=ranks)
        held.enter_context(trainer)
        parameters = sum(p.numel() for p in model.parameters())
        yield Started(source, parameters, device, precision, start, ranks.size)
        for text in notes:
            yield Noted(start, text)
        yield from trainer.steps(start, stop)


class Trainer:
    """One run's model, optimizer and data; as a context, it waits for the last checkpoint."""

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        source: Source,
        model: LanguageModel,
        optimizer: AnyOptimizer,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.run, self.source, self.model, self.optimizer = config, run, source, model, optimizer
        self.ranks, settings = ranks, config.training
        self.rows = settings.batch_size // ranks.batch_size
        """Of a batch, those of this process."""
        self.precision = _precision(settings, model.device)
        self.metrics = Metrics(run, tensorboard=settings.tensorboard)
        self.writer = checkpoint.Writer(run, keep=settings.keep_checkpoints, keep_best=settings.keep_best)
        self.best = Best()
        self.state: ModelState | None = None
        """The state behind the last step, where it is carried."""
        self.peak = peak_flops(model.device, self.precision)
        # a product has two in backward
        self.flops_per_token = 3 * flops_per_token(model, config.data.sequence_length)
        model.checkpoint_activations = settings.checkpoint_activations
        if settings.compile:
            compile_blocks(model)

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
        changed = snapshot.load_model(found.folder, self.model)
        snapshot.load_optimizer(found.folder, self.model, self.optimizer)
        if self.config.training.carry_state:
            state = snapshot.load_state(found.folder, self.model, self.config.training.batch_size)
            first = self.ranks.batch_rank * self.rows
            self.state = map_state(lambda leaf: leaf[first : first + self.rows].clone(), state)
        self.best = found.manifest.best
        return _differences(found.manifest, self.source, changed, self.ranks)

    def steps(self, start: int, stop: Callable[[], bool]) -> Iterator[Event]:
        """All steps from `start` on, with evaluations and checkpoints, until asked to stop, or no longer better."""
        settings = self.config.training
        first: float | None = None
        if self._out_of_patience:
            yield self._stopped_early(start)
            return
        for step in range(start, settings.steps):
            began = time.perf_counter()
            result = self.step(step)
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
                self._require_good(step)
                yield self.save(done, measured, wait=last or early or stopping)
            if early:
                yield self._stopped_early(done)
            if early or stopping:
                return

    def step(self, step: int) -> StepResult:
        """One optimizer step.

        Raises:
            TrainingError: the loss or the gradient is not finite; the parameters are then what they were.
        """
        settings = self.config.training
        self._seed(step)
        rate = learning_rate(step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        loss, state = self._backward(step)
        if not math.isfinite(loss):
            raise self._not_finite(step + 1, "loss", loss, lambda: self._forward(step))
        parameters = list(self.model.parameters())
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if not torch.isfinite(norm):
            raise self._not_finite(step + 1, "gradient's norm", norm.item(), None)
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state = state
        return StepResult(loss, norm.item(), rate)

    @torch.no_grad()
    def evaluate(self, *, final: bool = False, length: int | None = None) -> Measured:
        """How well the model does on what is held out; every sequence starts from nothing.

        Args:
            final: whether it is the last evaluation, which may have more batches.
            length: tokens of a sequence, those of training when None; batches have as many tokens at any length.
        """
        settings, trained = self.config.training, self.config.data.sequence_length
        limit = settings.final_evaluation_batches if final else settings.evaluation_batches
        length = length or trained
        parts = settings.accumulate * self.ranks.batch_size  # smaller batches, and as many sequences
        rows = before = settings.batch_size // parts
        rows = max(rows * trained // length, 1)
        if limit is not None:
            limit = max(limit * parts * before * trained // (rows * length), 1)
        self.model.eval()
        score = Score()
        for batch, slices in self._own_batches(self.source.evaluation_batches(rows, limit, length)):
            placed, targets = self._to_device(batch), self.model.own_targets(batch.targets)
            if slices is None:
                score.add(self._loss_sum(placed).item(), int((targets != IGNORED).sum()))
            else:
                with self._autocast():
                    loss, predicted = self.model.predictions(*placed)
                score.add_answers(loss.item(), predicted.cpu(), targets, slices)
        return Score.merged(self.ranks.gather(score.counts)).measured if self.ranks.size > 1 else score.measured

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
            data=self.source.digest,
        )
        state = None if self.state is None else map_state(self.ranks.rows, self.state)
        settle(self.model)
        parts = snapshot.gather(self.model, self.optimizer, state)
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

    # ---- a step

    def _backward(self, step: int) -> tuple[float, ModelState | None]:
        """The loss of a step's batch, part by part, with its gradients in the parameters; and the state to carry."""
        total = torch.zeros((), device=self.model.device)
        states: list[ModelState] = []
        for loss, state in self._losses(step):
            # of what processes have, gradients become the mean
            (loss if self.ranks.size == 1 else loss * self.ranks.size).backward()
            total += loss.detach()
            if state is not None:
                states.append(detach(state))
        return self.ranks.sum(total).item(), concatenate(states) if states else None

    def _losses(self, step: int) -> Iterator[tuple[torch.Tensor, ModelState | None]]:
        """The share of each part of this process's batch in a step's loss, and the state behind it if it is carried."""
        settings = self.config.training
        batch, state = self._batch(step), self._state_before(step)
        counted = (batch.targets != IGNORED).sum()
        # those that share a sequence have all counted it
        counted = (self.ranks.sum(counted) // self.ranks.context_size).clamp(min=1)
        rows = self.rows // settings.accumulate
        for number, part in enumerate(zip(*(x.chunk(settings.accumulate) for x in batch), strict=True)):
            if state is None:
                yield self._loss_sum(Batch(*part)) / counted, None
            else:
                # a copy: without gradients, a mixer may write where it was
                before = map_state(lambda leaf, at=number * rows: leaf[at : at + rows].clone(), state)
                loss, after = self._carried_loss_sum(Batch(*part), before)
                yield loss / counted, after

    @torch.no_grad()
    def _forward(self, step: int) -> None:
        """A step's batch once more, as it was computed."""
        self._seed(step)
        for _ in self._losses(step):
            pass

    def _seed(self, step: int) -> None:
        """Draw a step's dropout from its own generator, a process's from one of its own."""
        seed = self.config.seed << 32 | step
        if not self.ranks.first:
            seed = int(np.random.SeedSequence([seed, self.ranks.rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        torch.manual_seed(seed)

    def _batch(self, step: int) -> Batch:
        size, seed = self.config.training.batch_size, self.config.seed
        ranks = self.ranks
        return self._to_device(self.source.training_batch(step, size, seed, ranks.batch_rank, ranks.batch_size))

    def _state_before(self, step: int) -> ModelState | None:
        """The state that a step starts from: nothing, or where it is carried, that behind the step before."""
        settings = self.config.training
        if not settings.carry_state:
            return None
        goes_on = self.source.goes_on(step, settings.batch_size, self.config.seed)
        if goes_on and self.state is not None:
            return self.state
        # what a mixer makes like its parameters is in pieces where they are
        return map_state(whole, self.model.init_state(self.rows))

    def _loss_sum(self, batch: Batch) -> torch.Tensor:
        packed = self.source.packed(batch)
        with self._autocast():
            if packed is None:
                return self.model.loss(batch.inputs, batch.targets)
            return self.model.loss(packed.inputs, packed.targets, cu_seqlens=packed.cu_seqlens)

    def _carried_loss_sum(self, batch: Batch, state: ModelState) -> tuple[torch.Tensor, ModelState]:
        with self._autocast():
            return self.model.loss_and_state(batch.inputs, batch.targets, state)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, dtype=self.precision, enabled=self.precision != torch.float32)

    def _to_device(self, batch: Batch) -> Batch:
        return Batch(*(part.to(self.model.device, non_blocking=True) for part in batch))

    def _own_batches(self, batches: Iterator[Examples]) -> Iterator[Examples]:
        """Of batches, those of this process: one of each round, which is empty where there are no more."""
        batches, n = iter(batches), self.ranks.batch_size
        while part := list(islice(batches, n)):
            batch, slices = part[min(self.ranks.batch_rank, len(part) - 1)]
            if self.ranks.batch_rank >= len(part):
                batch = Batch(batch.inputs, torch.full_like(batch.targets, IGNORED))
            yield Examples(batch, slices)

    # ---- what is told

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
            memory_bytes=peak_memory(self.model.device),
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
        found = self.evaluate(final=final, length=length)
        if not math.isfinite(found.loss):
            forward = partial(self.evaluate, final=final, length=length)
            raise self._not_finite(done, "validation loss", found.loss, forward)
        return found

    @property
    def _out_of_patience(self) -> bool:
        patience = self.config.training.patience
        return patience is not None and self.best.evaluations_since >= patience

    def _stopped_early(self, done: int) -> StoppedEarly:
        return StoppedEarly(done, self.best.step, math.nan if self.best.loss is None else self.best.loss)

    @torch.no_grad()
    def _require_good(self, step: int) -> None:
        """Refuse to keep parameters (and a state) that an update has ruined: its loss was of those before it."""
        self.model.eval()

        def forward() -> float:
            # with a carried state, what comes next is behind it
            loss, _ = next(self._losses(step + 1 if self.config.training.carry_state else step))
            return self.ranks.sum(loss).item()

        if not math.isfinite(loss := forward()):
            raise self._not_finite(step + 1, "loss after the update", loss, forward)

    def _not_finite(self, done: int, what: str, value: float, forward: Callable[[], Any] | None) -> SeqmixError:
        """What to say of a value that is not finite, and where that began: forward, else in the gradients there are."""
        where = None
        if forward is not None and (module := first_module(self.model, forward)) is not None:
            where = f"first in the output of {module}"
        elif forward is None and (name := first_gradient(self.model.named_parameters())) is not None:
            where = f"first in the gradient of {name}"
        # as the first process has it that has anything
        where = next((place for place in self.ranks.gather(where) if place is not None), None)
        with suppress(checkpoint.CheckpointError):
            self.writer.wait()
        error = TrainingError(
            f"step {done}: the {what} is {value:g}{f', {where}' if where else ''}; try a lower training.learning_rate; "
            f"{kept(self.run)}"
        )
        return self.ranks.alike(error)


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


def _require_shares(config: RunConfig, ranks: Ranks) -> None:
    """Find out whether a batch has equal parts for all processes."""
    settings, shares = config.training, ranks.batch_size
    if settings.batch_size % (shares * settings.accumulate):
        raise TrainingError(
            f"training.batch_size = {settings.batch_size} is read by {shares} processes (data x shard) in "
            f"training.accumulate = {settings.accumulate} parts each: it must be a multiple of "
            f"{shares * settings.accumulate}"
        )


def _require_shared_mixers(model: LanguageModel, settings: TrainingConfig, ranks: Ranks) -> None:
    """Find out whether all mixers can share a sequence."""
    for name, block in zip(model.config.layers, model.blocks, strict=True) if ranks.context is not None else ():
        mixer = block.mixer
        if not mixer.splits and settings.compile:
            raise TrainingError(
                f"distributed.context = {ranks.context_size} hands the state of {mixer.kind} (model.blocks.{name}) "
                "from process to process, which cannot be compiled: set training.compile to false"
            )
        if not mixer.splits and mixer.traits.state == "growing":
            raise TrainingError(
                f"distributed.context = {ranks.context_size} shares each sequence among processes, and "
                f"{mixer.kind} of model.blocks.{name} cannot: its state grows with the text, and its `mix` does not "
                "read `context`; set distributed.context to 1, or take another mixer"
            )


def _require_free(run: Path) -> None:
    try:
        taken = run.exists() and (not run.is_dir() or any(run.iterdir()))
    except OSError as error:
        raise TrainingError(f"a run cannot be written to {run}: {error.strerror}") from error
    if taken and (run / CONFIG_FILE).exists():
        raise TrainingError(f"{run} already holds a run: go on with --resume {run}, or write elsewhere with --out DIR")
    if taken:
        raise TrainingError(f"{run} exists and is not an empty folder: write elsewhere with --out DIR")


def _claim(run: Path, config: RunConfig, comment: str) -> None:
    """Make the run's folder with its configuration, behind a comment; of two runs that start at once, one gets it."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        with (run / CONFIG_FILE).open("x") as file:
            file.write(comment + dump(config))
    except FileExistsError as error:
        raise TrainingError(f"{run} already holds a run, begun meanwhile: write elsewhere with --out DIR") from error
    except OSError as error:
        raise TrainingError(f"a run cannot be written to {run}: {error.strerror}") from error


@contextmanager
def _held(run: Path) -> Iterator[None]:
    """Keep other processes from going on with the same run; the system lets go of it however this one ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (run / CONFIG_FILE).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(f"another process trains {run}: stop it first, or wait until it ends") from error
        except OSError:  # a file system without locks
            pass
        yield


def _precision(settings: TrainingConfig, device: torch.device) -> torch.dtype:
    if settings.precision == "bfloat16":
        return torch.bfloat16
    able = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if settings.precision == "auto" and able else torch.float32
