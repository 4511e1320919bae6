"""The training loop of one process: a generator of events, which whoever shows them consumes.

Everything random in a step is a function of (seed, step): a resumed run goes on as the unbroken one would have.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models import IGNORED, LanguageModel, build_model, compile_blocks
from ..registry import SeqmixError, dump
from . import checkpoint
from .config import RunConfig, TrainingConfig
from .data import (
    Batch,
    Corpus,
    evaluation_batches,
    most_documents,
    pack,
    read_corpus,
    require_vocabulary,
    tokenizer_of,
    training_batch,
)
from .optim import build_optimizer, learning_rate

CONFIG_FILE, METRICS_FILE = "config.yaml", "metrics.jsonl"


class TrainingError(SeqmixError):
    """Training cannot start or go on."""


@dataclass(frozen=True)
class Started:
    """Model and text are there."""

    corpus: Corpus
    parameters: int
    device: torch.device
    precision: torch.dtype
    step: int
    """The first step to be made, from 0."""


@dataclass(frozen=True)
class Compiled:
    """The first step is through, and with it the compiler."""

    step: int
    seconds: float
    """What it took beyond a step that follows."""
    kinds: int
    """Kinds of blocks that were compiled."""


@dataclass(frozen=True)
class Stepped:
    """One optimizer step."""

    step: int
    """Steps made."""
    loss: float
    """Nats a token of this batch."""
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    """Of this step, from its start to its end."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluation."""

    step: int
    loss: float
    """Nats a token of the validation text."""
    final: bool


@dataclass(frozen=True)
class Saved:
    """One checkpoint."""

    step: int
    folder: Path


Event = Started | Compiled | Stepped | Evaluated | Saved


def train(
    config: RunConfig, run: str | Path, *, resume: bool = False, stop: Callable[[], bool] = lambda: False
) -> Iterator[Event]:
    """Train a model, event by event: it trains as it is iterated.

    Args:
        config: the run.
        run: its folder; made, and refused where it holds something already, unless resumed.
        resume: whether to go on from the newest checkpoint in it (from the start, where none was written).
        stop: asked behind every step; true writes a checkpoint and ends.

    Raises:
        SeqmixError: the folder, the text or a checkpoint cannot be used, the model cannot be built, or the loss is no
            longer finite. Nothing is written before all of these are there.
    """
    run = Path(run)
    if not resume:
        _require_free(run)
    # a resumed run reads its own copy of the vocabulary
    corpus = read_corpus(config.data.model_copy(update={"tokenizer": tokenizer_of(run, config)}))
    require_vocabulary(config, corpus.tokenizer)
    folder = next(reversed(checkpoint.checkpoints(run)), None) if resume else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = _precision(config.training, device)
    model = build_model(config.model, device=device, activations=precision, seed=config.seed)
    model.tokenizer = corpus.tokenizer
    optimizer = build_optimizer(model, config.training)
    start = 0
    if folder is not None:
        checkpoint.load_model(folder, model)
        checkpoint.load_optimizer(folder, model, optimizer)
        start = checkpoint.step_of(folder)
    elif not resume:
        kernels = "".join(f", {name}: {backend}" for name, backend in model.backends.items())
        _claim(run, config, f"# kernels on {device} in {precision}{kernels}\n" if kernels else "")
        corpus.tokenizer.save(run)
    trainer = Trainer(config, run, corpus, model, optimizer)
    trainer.drop_metrics_behind(start)
    yield Started(corpus, sum(p.numel() for p in model.parameters()), device, trainer.precision, start)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield from trainer.steps(start, stop)


class Trainer:
    """One run's model, optimizer and text."""

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        corpus: Corpus,
        model: LanguageModel,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.config, self.run, self.corpus, self.model, self.optimizer = config, run, corpus, model, optimizer
        self.precision = _precision(config.training, model.device)
        model.checkpoint_activations = config.training.checkpoint_activations
        self.most_documents: int | None = None
        """Of a sequence, where documents are packed."""
        if config.data.packing:
            length, begin = config.data.sequence_length, corpus.tokenizer.begin
            self.most_documents = max(most_documents(t, length, begin) for t in (corpus.train, corpus.validation))
        if config.training.compile:
            compile_blocks(model)

    def steps(self, start: int, stop: Callable[[], bool]) -> Iterator[Event]:
        """All steps from `start` on, with evaluations and checkpoints, until asked to stop."""
        settings = self.config.training
        first: float | None = None
        for step in range(start, settings.steps):
            began = time.perf_counter()
            loss, norm, rate = self.step(step)
            seconds = time.perf_counter() - began
            done = step + 1
            self._require_finite(done, "loss", loss)
            self._require_finite(done, "gradient's norm", norm)
            if settings.compile and first is None:
                first = seconds
            elif settings.compile and step == start + 1 and first is not None:
                yield Compiled(done, first - seconds, len(set(self.config.model.layers)))
            stepped = Stepped(done, loss, rate, norm, self._tokens_per_step / seconds)
            if done % settings.log_every == 0 or done == settings.steps:
                self._record(stepped.__dict__)
            yield stepped
            final = done == settings.steps
            if final or done % settings.evaluate_every == 0:
                validation_loss = self.evaluate(final=final)
                self._require_finite(done, "validation loss", validation_loss)
                self._record({"step": done, "validation_loss": validation_loss, "final": final})
                yield Evaluated(done, validation_loss, final)
            stopping = stop()
            if final or stopping or done % settings.checkpoint_every == 0:
                # the loss of the step was that of the parameters before it: an update may have ruined them
                self._require_finite(done, "loss after the update", self._loss_behind(step))
                yield self.save(done)
            if stopping:
                return

    def step(self, step: int) -> tuple[float, float, float]:
        """One optimizer step: the loss before it, the gradient's norm and the learning rate."""
        settings = self.config.training
        torch.manual_seed(self.config.seed << 32 | step)  # dropout
        rate = learning_rate(step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self._batch(step)
        counted = (batch.targets != IGNORED).sum().clamp(min=1)
        self.model.train()
        total = torch.zeros((), device=self.model.device)
        for inputs, targets in zip(*(part.chunk(settings.accumulate) for part in batch), strict=True):
            loss = self._loss_sum(Batch(inputs, targets)) / counted
            loss.backward()
            total += loss.detach()
        limit = math.inf if settings.clip_norm is None else settings.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item(), norm.item(), rate

    @torch.no_grad()
    def evaluate(self, *, final: bool = False) -> float:
        """Nats a token of the validation text; every sequence starts from nothing."""
        settings = self.config.training
        limit = settings.final_evaluation_batches if final else settings.evaluation_batches
        self.model.eval()
        total, counted = 0.0, 0
        parts = settings.accumulate  # smaller batches, and as many sequences
        for batch in evaluation_batches(
            self.corpus.validation,
            self.config.data.sequence_length,
            settings.batch_size // parts,
            None if limit is None else limit * parts,
            begin=self.corpus.tokenizer.begin,
        ):
            total += self._loss_sum(self._to_device(batch)).item()
            counted += int((batch.targets != IGNORED).sum())
        return total / max(counted, 1)

    def save(self, step: int) -> Saved:
        """Write a checkpoint behind `step` steps."""
        keep = self.config.training.keep_checkpoints
        return Saved(step, checkpoint.save(self.run, step, self.model, self.optimizer, keep))

    def drop_metrics_behind(self, step: int) -> None:
        """Forget measurements of steps that will be made again, and lines that are none (a write cut short)."""
        file = self.run / METRICS_FILE
        lines = file.read_text(errors="replace").splitlines(keepends=True) if file.exists() else []
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text("".join(line for line in lines if _step_of(line) <= step))
        partial.replace(file)

    def _batch(self, step: int) -> Batch:
        batch = training_batch(
            self.corpus.train,
            self.config.data.sequence_length,
            self.config.training.batch_size,
            seed=self.config.seed,
            step=step,
            order=self.config.data.order,
            begin=self.corpus.tokenizer.begin,
        )
        return self._to_device(batch)

    @torch.no_grad()
    def _loss_behind(self, step: int) -> float:
        """The loss of the first part of a step's batch, with the parameters behind the step."""
        self.model.eval()
        part = Batch(*(x.chunk(self.config.training.accumulate)[0] for x in self._batch(step)))
        return self._loss_sum(part).item()

    def _require_finite(self, step: int, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"step {step}: the {what} is {value:g}; try a lower training.learning_rate; "
                f"checkpoints of earlier steps, if any, are in {self.run / 'checkpoints'}"
            )

    @property
    def _tokens_per_step(self) -> int:
        return self.config.training.batch_size * self.config.data.sequence_length

    def _loss_sum(self, batch: Batch) -> torch.Tensor:
        device = self.model.device.type
        with torch.autocast(device, dtype=self.precision, enabled=self.precision != torch.float32):
            if self.most_documents is None:
                return self.model.loss(batch.inputs, batch.targets)
            packed = pack(batch, self.most_documents, self.corpus.tokenizer.begin)
            return self.model.loss(packed.inputs, packed.targets, cu_seqlens=packed.cu_seqlens)

    def _to_device(self, batch: Batch) -> Batch:
        return Batch(*(part.to(self.model.device, non_blocking=True) for part in batch))

    def _record(self, values: dict[str, Any]) -> None:
        with (self.run / METRICS_FILE).open("a") as file:
            file.write(json.dumps(values) + "\n")


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinite if it is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
    return step if isinstance(step, int) and line.endswith("\n") else math.inf


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


def _precision(settings: TrainingConfig, device: torch.device) -> torch.dtype:
    if settings.precision == "bfloat16":
        return torch.bfloat16
    able = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if settings.precision == "auto" and able else torch.float32
