"""One training step, and one evaluation, of a model on one process or many.

All processes make their collective calls in the same order. Everything random in a step is a function of seed, step and
rank, so a resumed run continues exactly as an uninterrupted one.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..blocks import Dropout
from ..data import Batch, Examples, Source
from ..mixers.state import concatenate, detach, map_state
from ..models import IGNORED, LanguageModel, ModelState, compile_blocks
from .config import RunConfig
from .distributed.process_groups import ALONE, ProcessGroups
from .distributed.sharding import full_tensor, keep_gathered, local_tensor
from .ema import Ema
from .loader import Loader
from .monitoring.metrics import Measured, Score
from .nonfinite import NotFiniteError, Place, first_gradient, first_module
from .objective import Objective
from .optimizer import AnyOptimizer
from .precision import precision_of
from .schedule import learning_rate
from .skipping import Skipping

_Calls: TypeAlias = Callable[[], Iterator[object]]
_Named: TypeAlias = Callable[[Place], str]
_Origin: TypeAlias = Callable[[int, int], str | None]


class StepResult(NamedTuple):
    """The result of one optimizer step."""

    loss: float
    """Nats per token, before the step."""
    gradient_norm: float
    """Before clipping."""
    learning_rate: float
    expert_violation: float | None = None
    """The largest load of an expert over its layer's mean, minus 1 (MaxVio); None without experts."""
    skipped: str | None = None
    """Why the parameters were left as they are; None where they were not."""


class Trainer:
    """A model, its optimizer, and its training data."""

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        model: LanguageModel,
        optimizer: AnyOptimizer,
        groups: ProcessGroups = ALONE,
        objective: Objective | None = None,
    ) -> None:
        self.config = config
        self.source = source
        self.model = model
        self.optimizer = optimizer
        self.groups = groups
        self.objective = objective or Objective()
        self.rows = config.training.batch_size // groups.dp_size
        """Rows of a batch on this process."""
        self.loader = Loader(config, source, model.device, groups)
        self.precision = precision_of(config.training, model.device)
        self.state: ModelState | None = None
        """The recurrent state after the last step, with training.carry_state: this process's rows."""
        self.ema = None if config.training.ema is None else Ema(model, config.training.ema)
        """The moving average of the parameters, with training.ema."""
        self.skipping = Skipping(config.training)
        self.dropouts = [module for module in model.modules() if isinstance(module, Dropout) and module.p > 0]
        model.activation_checkpointing = config.training.activation_checkpointing
        if config.training.compile:
            compile_blocks(model)

    def train_step(self, step: int) -> StepResult:
        """One optimizer step, or none if it is to be skipped.

        Raises:
            NotFiniteError: the loss or the gradient is not finite, without training.skip_nonfinite; the parameters are
                unchanged.
        """
        settings = self.config.training
        states = []
        self.model.train()
        total = torch.zeros((), device=self.model.device)
        once = self.config.distributed.gather_once and self.groups.size > 1
        for number, (loss, state) in enumerate(self._losses(step), start=1):
            if once:
                keep_gathered(self.model, number < settings.grad_accum_steps)
            (loss * self.groups.size).backward()  # gradients are averaged over processes
            total += loss.detach()
            states += [] if state is None else [detach(state)]
        loss = self.groups.sum(total).item()
        parameters = list(self.model.parameters())
        rate = learning_rate(step, settings)
        norm = full_tensor(get_total_norm([p.grad for p in parameters if p.grad is not None]))
        state = concatenate(states) if states else None
        try:
            in_step = self._in_step(step)
            self._require_finite("loss", loss, lambda: self._losses(step), in_step)
            self._require_finite(
                "gradient's norm",
                norm.item(),
                lambda: (loss.backward() for loss, _ in self._losses(step)),
                in_step,
                True,
            )
            skipped = self.skipping.reason(norm.item())
        except NotFiniteError as error:
            if not settings.skip_nonfinite or self.skipping.hopeless():
                raise
            # what is carried on is not finite either
            skipped = str(error)
            state = None
        if skipped is not None:
            self.skipping.skipped += 1
            self.optimizer.zero_grad(set_to_none=True)
            self.state = state
            return StepResult(loss, norm.item(), rate, self._balance(), skipped)
        if settings.clip_norm is not None:
            clip_grads_with_norm_(parameters, settings.clip_norm, norm)

        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, step)
        self.state = state
        return StepResult(loss, norm.item(), rate, self._balance())

    def _balance(self) -> float | None:
        """Let every mixture of experts balance its load; the worst violation."""
        ffns = [block.ffn for block in self.model.distinct_blocks if block.ffn is not None]
        found = [violation for ffn in ffns if (violation := ffn.balance(self.groups.sum)) is not None]
        return max(found, default=None)

    def evaluate(self, *, final: bool = False, length: int | None = None) -> Measured:
        """Evaluate the model on the validation split; every sequence starts from an empty state.

        Args:
            final: whether it is the final evaluation, which may have more batches.
            length: sequence length, that of training when None; batches have the same number of tokens at any length.

        Raises:
            NotFiniteError: the loss is not finite.
        """
        settings = self.config.training
        trained = self.config.data.sequence_length
        limit = settings.final_evaluation_batches if final else settings.evaluation_batches
        length = length or trained
        # the same number of tokens as in a micro-batch of training
        rows = max(self.rows // settings.grad_accum_steps * trained // length, 1)
        limit = None if limit is None else max(limit * settings.batch_size * trained // (rows * length), 1)
        score = Score()
        total = Score()
        list(self._scored(score, rows, limit, length))
        for counts in self.groups.gather(asdict(score)):
            total.merge(counts)
        origin = partial(self.source.evaluation_origin, rows, limit, length)
        named = partial(self._sequence, "evaluation", origin, (rows, length, rows, rows * self.groups.dp_size))
        calls = partial(self._scored, Score(), rows, limit, length)
        self._require_finite("validation loss", total.measured.loss, calls, named)
        return total.measured

    @torch.no_grad()
    def require_finite_update(self, step: int) -> None:
        """Refuse parameters (or a state) that the update made non-finite: the loss was measured before the update."""
        self.model.eval()
        step += self.config.training.carry_state  # a carried state belongs to the next batch
        loss, _ = next(self._losses(step))
        loss = self.groups.sum(loss).item()
        self._require_finite("loss after the update", loss, lambda: islice(self._losses(step), 1), self._in_step(step))

    def parameters_are_finite(self) -> bool:
        """Whether all parameters are, on all processes; a loss of them may still overflow."""
        finite = torch.stack([local_tensor(p).isfinite().all() for p in self.model.parameters()]).all()
        return not self.groups.any(not finite.item())

    def batch(self, step: int) -> Batch:
        """This process's rows of a step's batch, on the model's device."""
        return self.loader.batch(step)

    def _losses(self, step: int) -> Iterator[tuple[Tensor, ModelState | None]]:
        """Of each micro-batch, its share of the batch's loss, and the state after it if it is carried."""
        self._seed(step)
        parts = self.config.training.grad_accum_steps
        batch = self.batch(step)
        state = self._state_before(step)
        rows = self.rows // parts
        # all ranks of a context-parallel group have counted the same targets
        asked = self.groups.sum((batch.targets != IGNORED).sum()) // self.groups.context_parallel
        for number, part in enumerate(zip(*(x.chunk(parts) for x in batch), strict=True)):
            at = slice(number * rows, (number + 1) * rows)
            # a copy: without autograd, a mixer may write it in place
            before = None if state is None else map_state(lambda leaf, at=at: leaf[at].clone(), state)
            packed = self.source.packed(Batch(*part))
            with self._dropout_of(step, number * rows, packed.inputs.shape[1], part[0].shape[1]):
                with self._autocast():
                    output = self.objective(self.model, packed, before)
                assert output.loss is not None
                yield output.loss / asked.clamp(min=1), output.state  # backward may run forward again

    def _state_before(self, step: int) -> ModelState | None:
        """The initial state of a step: None, or with training.carry_state that after the previous step."""
        settings = self.config.training
        if not settings.carry_state:
            return None
        if self.state is not None and self.source.goes_on(step, settings.batch_size, self.config.seed):
            return self.state
        # a state that a mixer makes from its parameters is sharded like them
        return map_state(full_tensor, self.model.init_state(self.rows))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, self.precision, enabled=self.precision != torch.float32)

    @contextmanager
    def _dropout_of(self, step: int, row: int, width: int, length: int) -> Iterator[None]:
        """Inside, dropout has the masks of rows of the whole batch, from `row` of this process's on, each `length` long
        and `width` with others it is packed with; outside, those of torch."""
        groups = self.groups
        own = -(-width // groups.context_parallel)  # of the tokens that ranks share
        first = (groups.dp_rank * self.rows + row) * length + groups.rank % groups.context_parallel * own
        keys = np.random.SeedSequence([self.config.seed, step]).generate_state(len(self.dropouts), np.uint64)
        places = torch.tensor([[key, first, length] for key in keys.view(np.int64).tolist()], device=self.model.device)
        try:
            for module, place in zip(self.dropouts, places, strict=True):
                module.place = place
            yield
        finally:  # a loop of another's would have one mask for ever
            for module in self.dropouts:
                module.place = None

    def _seed(self, step: int) -> None:
        """Seed what else draws, by step and by rank beyond the first."""
        seed = self.config.seed << 32 | step
        if not self.groups.is_main:
            seed = int(np.random.SeedSequence([seed, self.groups.rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        torch.manual_seed(seed)

    def _to_device(self, batch: Batch) -> Batch:
        return Batch(*(part.to(self.model.device, non_blocking=True) for part in batch))

    @torch.no_grad()
    def _scored(self, score: Score, rows: int, limit: int | None, length: int) -> Iterator[None]:
        """Add this rank's batches of the validation split to a score, one by one."""
        self.model.eval()
        for batch, slices in self._own_batches(self.source.evaluation_batches(rows, limit, length)):
            inputs, targets, cu_seqlens = self.source.packed(self._to_device(batch))
            parts = self.source.loss_slices(batch)
            how = {"reduction": "none" if parts else "sum", "return_predictions": slices is not None}
            with self._autocast():
                output = self.model(inputs, targets=targets, cu_seqlens=cu_seqlens, **how)
            predicted = None if output.predictions is None else output.predictions.cpu()
            assert output.loss is not None
            asked = self.model.local_targets(batch.targets)
            score.add(output.loss.sum().item(), asked, predicted, slices)
            for axis, part in parts.items():
                own = part._replace(of=self.model.local_targets(part.of))
                score.add_slices(output.loss.view(asked.shape).cpu(), asked, axis, own)
            yield

    def _own_batches(self, batches: Iterator[Examples]) -> Iterator[Examples]:
        """This rank's batches, round-robin; without targets where there are no more."""
        batches = iter(batches)
        rank = self.groups.dp_rank
        while part := list(islice(batches, self.groups.dp_size)):
            batch, slices = part[min(rank, len(part) - 1)]
            if rank >= len(part):
                batch = Batch(batch.inputs, torch.full_like(batch.targets, IGNORED))
            yield Examples(batch, slices)

    def _require_finite(self, what: str, value: float, calls: _Calls, named: _Named, backward: bool = False) -> None:
        """Refuse a value that is not finite, and report where that began, in forward or in the gradients."""
        if math.isfinite(value):
            return
        place = first_module(self.model, calls, backward=backward)
        name = first_gradient(self.model.named_parameters()) if backward else place and place.module
        at = name and f"{'gradient' if backward else 'output'} of {name}"
        # of the first rank that found it: another one may hold the parameter
        said = zip(*self.groups.gather((at, place and named(place))), strict=True)
        at, sequence = (next(filter(None, each), "") for each in said)
        raise NotFiniteError(f"the {what} is {value:g}{at and f', first in the {at}{sequence}'}")

    def _in_step(self, step: int) -> _Named:
        rows = self.rows // self.config.training.grad_accum_steps
        length = self.config.data.sequence_length
        origin = partial(self.source.origin, step, self.config.training.batch_size, self.config.seed)
        return partial(self._sequence, "batch", origin, (rows, length, self.rows, rows))

    def _sequence(self, of: str, origin: _Origin, sizes: tuple[int, int, int, int], place: Place) -> str:
        """Where numbers are first not finite, as text; nothing if they are so everywhere.

        `sizes` has the sequences of a call, their length, and those from one rank, and one call, to the next.
        """
        (rows, length, by_rank, by_call), ranks, tokens = sizes, self.groups.context_parallel, place.tokens
        wide = 1 if tokens is None or len(tokens) == 1 else rows
        if tokens is None or tokens.shape != (wide, rows * length // wide // ranks):
            return ""
        row, at = (int(i) for i in tokens.nonzero()[-1 if place.backward else 0])
        # ranks share every row of the model's input, which has all sequences where documents are packed
        at += (row * ranks + self.groups.rank % ranks) * tokens.shape[1]
        row = at // length + self.groups.dp_rank * by_rank + place.call * by_call
        token = at % length
        where = "" if (found := origin(row, token)) is None else f" ({found})"
        side = f"up to token {token}" if place.backward else f"from token {token} on"
        return f", in sequence {row} of the {of} {side}{where}"
