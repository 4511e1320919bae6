"""A model that learns and is measured: one optimizer step, one evaluation, on one process or many.

What processes do together, all do in the same order. Everything random in a step is a function of (seed, step), and of
the process: a resumed run goes on as the unbroken one would have.
"""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from ..data import Batch, Examples, Source
from ..mixers.state import concatenate, detach, map_state
from ..models import IGNORED, LanguageModel, ModelState, compile_blocks
from .config import RunConfig, TrainingConfig
from .metrics import Measured, Score
from .nonfinite import NotFiniteError, first_gradient, first_module
from .optim import AnyOptimizer, learning_rate
from .ranks import ALONE, Ranks
from .sharding import whole


class StepResult(NamedTuple):
    """What one optimizer step gives."""

    loss: float
    """Nats a token, before the step."""
    gradient_norm: float
    """Before it was clipped."""
    learning_rate: float


class Learner:
    """One run's model, optimizer and data."""

    def __init__(
        self, config: RunConfig, source: Source, model: LanguageModel, optimizer: AnyOptimizer, ranks: Ranks = ALONE
    ) -> None:
        self.config, self.source, self.model, self.optimizer = config, source, model, optimizer
        self.ranks, settings = ranks, config.training
        self.rows = settings.batch_size // ranks.batch_size
        """Of a batch, those of this process."""
        self.precision = precision_of(settings, model.device)
        self.state: ModelState | None = None
        """The state behind the last step, where it is carried: this process's rows."""
        model.activation_checkpointing = settings.activation_checkpointing
        if settings.compile:
            compile_blocks(model)

    def step(self, step: int) -> StepResult:
        """One optimizer step.

        Raises:
            NotFiniteError: the loss or the gradient is not finite; the parameters are then what they were.
        """
        settings = self.config.training
        self._seed(step)
        rate = learning_rate(step, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        loss, state = self._backward(step)
        if not math.isfinite(loss):
            raise self._not_finite("loss", loss, lambda: self._forward(step))
        parameters = list(self.model.parameters())
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if not torch.isfinite(norm):
            raise self._not_finite("gradient's norm", norm.item(), None)
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, settings.clip_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state = state
        return StepResult(loss, norm.item(), rate)

    def evaluate(self, *, final: bool = False, length: int | None = None) -> Measured:
        """How well the model does on what is held out; every sequence starts from nothing.

        Args:
            final: whether it is the last evaluation, which may have more batches.
            length: tokens of a sequence, those of training when None; batches have as many tokens at any length.

        Raises:
            NotFiniteError: the loss is not finite.
        """
        found = self._evaluate(final, length)
        if not math.isfinite(found.loss):
            raise self._not_finite("validation loss", found.loss, lambda: self._evaluate(final, length))
        return found

    @torch.no_grad()
    def require_good(self, step: int) -> None:
        """Refuse to keep parameters (and a state) that an update has ruined: its loss was of those before it.

        Raises:
            NotFiniteError: so it has.
        """
        self.model.eval()

        def forward() -> float:
            # with a carried state, what comes next is behind it
            loss, _ = next(self._losses(step + 1 if self.config.training.carry_state else step))
            return self.ranks.sum(loss).item()

        if not math.isfinite(loss := forward()):
            raise self._not_finite("loss after the update", loss, forward)

    # ---- an evaluation

    @torch.no_grad()
    def _evaluate(self, final: bool, length: int | None) -> Measured:
        settings, trained = self.config.training, self.config.data.sequence_length
        limit = settings.final_evaluation_batches if final else settings.evaluation_batches
        length = length or trained
        parts = settings.grad_accum_steps * self.ranks.batch_size  # smaller batches, and as many sequences
        rows = before = settings.batch_size // parts
        rows = max(rows * trained // length, 1)
        if limit is not None:
            limit = max(limit * parts * before * trained // (rows * length), 1)
        self.model.eval()
        score = Score()
        for batch, slices in self._own_batches(self.source.evaluation_batches(rows, limit, length)):
            placed, targets = self._to_device(batch), self.model.local_targets(batch.targets)
            if slices is None:
                score.add(self._loss_sum(placed).item(), int((targets != IGNORED).sum()))
            else:
                with self._autocast():
                    output = self.model(placed.inputs, targets=placed.targets, reduction="sum", return_predictions=True)
                score.add_answers(output.loss.item(), output.predictions.cpu(), targets, slices)
        return Score.merged(self.ranks.gather(score.counts)).measured if self.ranks.size > 1 else score.measured

    def _own_batches(self, batches: Iterator[Examples]) -> Iterator[Examples]:
        """Of batches, those of this process: one of each round, which is empty where there are no more."""
        batches, n = iter(batches), self.ranks.batch_size
        while part := list(islice(batches, n)):
            batch, slices = part[min(self.ranks.batch_rank, len(part) - 1)]
            if self.ranks.batch_rank >= len(part):
                batch = Batch(batch.inputs, torch.full_like(batch.targets, IGNORED))
            yield Examples(batch, slices)

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
        rows = self.rows // settings.grad_accum_steps
        for number, part in enumerate(zip(*(x.chunk(settings.grad_accum_steps) for x in batch), strict=True)):
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
        size, seed, ranks = self.config.training.batch_size, self.config.seed, self.ranks
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
                return self.model(batch.inputs, targets=batch.targets, reduction="sum").loss
            found = self.model(packed.inputs, targets=packed.targets, reduction="sum", cu_seqlens=packed.cu_seqlens)
            return found.loss

    def _carried_loss_sum(self, batch: Batch, state: ModelState) -> tuple[torch.Tensor, ModelState]:
        with self._autocast():
            found = self.model(batch.inputs, state, targets=batch.targets, reduction="sum", return_state=True)
            return found.loss, found.state

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, dtype=self.precision, enabled=self.precision != torch.float32)

    def _to_device(self, batch: Batch) -> Batch:
        return Batch(*(part.to(self.model.device, non_blocking=True) for part in batch))

    def _not_finite(self, what: str, value: float, forward: Callable[[], Any] | None) -> NotFiniteError:
        """What to say of a value that is not finite, and where that began: forward, else in the gradients there are."""
        where = None
        if forward is not None and (module := first_module(self.model, forward)) is not None:
            where = f"first in the output of {module}"
        elif forward is None and (name := first_gradient(self.model.named_parameters())) is not None:
            where = f"first in the gradient of {name}"
        # as the first process has it that has anything
        where = next((place for place in self.ranks.gather(where) if place is not None), None)
        return NotFiniteError(f"the {what} is {value:g}{f', {where}' if where else ''}")


def precision_of(settings: TrainingConfig, device: torch.device) -> torch.dtype:
    """The type that matrix products are computed in."""
    if settings.precision == "bfloat16":
        return torch.bfloat16
    able = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if settings.precision == "auto" and able else torch.float32
