"""The training step and the evaluation of a model, on one process or many.

All processes make their collective calls in the same order. All randomness in a step is a function of seed, step and
rank, so a resumed run continues exactly like an uninterrupted one.
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
from ..mixers.base.state import concatenate, detach, map_state
from ..models import IGNORED, LanguageModel, ModelState, compile_blocks
from .config import RunConfig
from .distributed.process_groups import ALONE, ProcessGroups
from .distributed.sharding import full_tensor, keep_gathered, local_tensor
from .ema import Ema
from .loader import Loader
from .monitoring.metrics import Measured, Score
from .nonfinite import NotFiniteError, Place, first_gradient, first_module
from .objective import Objective
from .optimizer import AnyOptimizer, set_learning_rate
from .precision import precision_of
from .schedule import learning_rate
from .skipping import Skipping

_Calls: TypeAlias = Callable[[], Iterator[object]]
"""Function that returns an iterator; each iteration calls the model once."""
_Describe: TypeAlias = Callable[[Place], str]
"""Function that describes a place in the data, as the end of a sentence."""
_Origin: TypeAlias = Callable[[int, int], str | None]
"""Function that returns the file and offset of a token, given its row and its index in that row."""


class _Part(NamedTuple):
    """Part of a batch's loss that a micro-batch contributes."""

    loss: Tensor
    """Loss that is reported: the cross-entropy, per target of the whole batch."""
    minimised: Tensor
    """Loss that is minimised: the same, and the auxiliary losses of mixers per token of the whole batch."""
    state: ModelState | None
    """Final state with training.carry_state."""


class StepResult(NamedTuple):
    """The result of one optimizer step."""

    loss: float
    """Loss before the step, in nats per token."""
    gradient_norm: float
    """Gradient norm before clipping."""
    learning_rate: float
    """Learning rate of this step."""
    expert_violation: float | None = None
    """Largest load of an expert divided by its layer's mean load, minus 1 (MaxVio); None without experts."""
    skipped: str | None = None
    """Why the step was skipped, leaving the parameters unchanged; None if it was taken."""


class Trainer:
    """Trainer of a model: makes optimizer steps, and evaluates.

    Args:
        config: the run.
        source: the data.
        model: the model, sharded if there are several processes.
        optimizer: the optimizer of its parameters.
        groups: the processes of the run.
        objective: the loss; cross-entropy when None.
    """

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
        """Number of rows of a batch on this process."""
        self.loader = Loader(config, source, model.device, groups)
        self.precision = precision_of(config.training, model.device)
        self.state: ModelState | None = None
        """Recurrent state of this process's rows after the last step; None without training.carry_state."""
        self.ema = None if config.training.ema is None else Ema(model, config.training.ema)
        """Moving average of the parameters; None without training.ema."""
        self.skipping = Skipping(config.training)
        self.dropouts = [module for module in model.modules() if isinstance(module, Dropout) and module.p > 0]
        model.activation_checkpointing = config.training.activation_checkpointing
        if config.training.compile:
            compile_blocks(model)

    def train_step(self, step: int) -> StepResult:
        """Make one optimizer step, or skip it.

        Args:
            step: the number of the step, from 0.

        Raises:
            NotFiniteError: the loss or the gradient is NaN or infinite, and training.skip_nonfinite is off, or too
                many steps in a row were skipped. The parameters are unchanged.
        """
        settings = self.config.training
        states = []
        self.model.train()
        total = torch.zeros((), device=self.model.device)
        gathers_once = self.config.distributed.gather_once and self.groups.size > 1
        for number, (loss, minimised, state) in enumerate(self._losses(step), start=1):
            if gathers_once:
                keep_gathered(self.model, number < settings.grad_accum_steps)
            (minimised * self.groups.size).backward()  # gradients are averaged over processes
            total += loss.detach()
            states += [] if state is None else [detach(state)]
        loss = self.groups.sum(total).item()
        parameters = list(self.model.parameters())
        rate = learning_rate(step, settings)
        norm = full_tensor(get_total_norm([p.grad for p in parameters if p.grad is not None]))
        state = concatenate(states) if states else None
        try:
            describe = self._describe_in_batch(step)
            self._require_finite("loss", loss, lambda: self._losses(step), describe)
            self._require_finite(
                "gradient's norm",
                norm.item(),
                lambda: (part.minimised.backward() for part in self._losses(step)),
                describe,
                backward=True,
            )
            skipped = self.skipping.reason(norm.item())
        except NotFiniteError as error:
            if not settings.skip_nonfinite or self.skipping.count_nonfinite():
                raise
            # the state after the step is not finite either
            skipped = str(error)
            state = None
        if skipped is not None:
            self.skipping.skipped += 1
            self.optimizer.zero_grad(set_to_none=True)
            self.state = state
            return StepResult(loss, norm.item(), rate, self._balance_experts(), skipped)
        if settings.clip_norm is not None:
            clip_grads_with_norm_(parameters, settings.clip_norm, norm)

        set_learning_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model, step)
        self.state = state
        return StepResult(loss, norm.item(), rate, self._balance_experts())

    def _balance_experts(self) -> float | None:
        """Let every mixture of experts balance its load; return the largest violation, None without experts."""
        ffns = [block.ffn for block in self.model.distinct_blocks if block.ffn is not None]
        violations = [violation for ffn in ffns if (violation := ffn.balance(self.groups.sum)) is not None]
        return max(violations, default=None)

    def evaluate(self, *, final: bool = False, length: int | None = None) -> Measured:
        """Evaluate the model on the validation split; every sequence starts from an empty state.

        Args:
            final: True for the final evaluation, of training.final_evaluation_batches batches.
            length: sequence length; that of training when None. A batch has about as many tokens at any length.

        Raises:
            NotFiniteError: the loss is not finite.
        """
        settings = self.config.training
        trained_length = self.config.data.sequence_length
        limit = settings.final_evaluation_batches if final else settings.evaluation_batches
        length = length or trained_length
        # the same number of tokens as in a micro-batch of training
        rows = max(self.rows // settings.grad_accum_steps * trained_length // length, 1)
        limit = None if limit is None else max(limit * settings.batch_size * trained_length // (rows * length), 1)
        score = Score()
        total = Score()
        list(self._add_scores(score, rows, limit, length))
        for counts in self.groups.gather(asdict(score)):
            total.merge(counts)
        origin = partial(self.source.evaluation_origin, rows, limit, length)
        describe = partial(self._describe_place, "evaluation", origin, (rows, length, rows, rows * self.groups.dp_size))
        calls = partial(self._add_scores, Score(), rows, limit, length)
        self._require_finite("validation loss", total.measured.loss, calls, describe)
        return total.measured

    @torch.no_grad()
    def require_finite_update(self, step: int) -> None:
        """Raise NotFiniteError if the update made the parameters or the state non-finite.

        The loss of the step was measured before its update, so the loss of a micro-batch is measured again.
        """
        self.model.eval()
        step += self.config.training.carry_state  # a carried state belongs to the next batch
        loss = self.groups.sum(next(self._losses(step)).loss).item()
        calls = lambda: islice(self._losses(step), 1)  # noqa: E731
        self._require_finite("loss after the update", loss, calls, self._describe_in_batch(step))

    def parameters_are_finite(self) -> bool:
        """Return True if all parameters are finite on all processes. The loss may overflow nonetheless."""
        finite = torch.stack([local_tensor(p).isfinite().all() for p in self.model.parameters()]).all()
        return not self.groups.any(not finite.item())

    def batch(self, step: int) -> Batch:
        """Return this process's rows of a step's batch, on the model's device."""
        return self.loader.batch(step)

    def _losses(self, step: int) -> Iterator[_Part]:
        """Yield the part of each micro-batch."""
        self._seed(step)
        parts = self.config.training.grad_accum_steps
        batch = self.batch(step)
        state = self._initial_state(step)
        rows = self.rows // parts
        # all ranks of a context-parallel group count the same targets
        n_targets = self.groups.sum((batch.targets != IGNORED).sum()) // self.groups.context_parallel
        for number, part in enumerate(zip(*(x.chunk(parts) for x in batch), strict=True)):
            part_rows = slice(number * rows, (number + 1) * rows)
            # a copy, as a mixer may write a state in place without autograd
            before = None if state is None else map_state(lambda leaf, at=part_rows: leaf[at].clone(), state)
            packed = self.source.packed(Batch(*part))
            with self._place_dropout(step, number * rows, packed.inputs.shape[1], part[0].shape[1]):
                with self._autocast():
                    output = self.objective(self.model, packed, before)
                assert output.loss is not None
                # inside the context, as the backward pass may run the forward pass again
                loss = minimised = output.loss / n_targets.clamp(min=1)
                if output.auxiliary_loss is not None:
                    minimised = loss + output.auxiliary_loss / (batch.inputs.numel() * self.groups.dp_size)
                yield _Part(loss, minimised, output.state)

    def _initial_state(self, step: int) -> ModelState | None:
        """Return the initial state of a step: with training.carry_state the last step's final state, else None."""
        settings = self.config.training
        if not settings.carry_state:
            return None
        if self.state is not None and self.source.goes_on(step, settings.batch_size, self.config.seed):
            return self.state
        # an initial state that is a parameter of a mixer is sharded
        return map_state(full_tensor, self.model.init_state(self.rows))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, self.precision, enabled=self.precision != torch.float32)

    @contextmanager
    def _place_dropout(self, step: int, row: int, width: int, length: int) -> Iterator[None]:
        """Context in which dropout masks depend on a token's place in the whole batch, not on how the batch is divided.

        Outside of this context, dropout draws from torch's generator.

        Args:
            step: the number of the step, from 0.
            row: first row of the micro-batch, among this process's rows.
            width: tokens of a row of the model's input, which is one sequence or several packed ones.
            length: tokens of one sequence.
        """
        groups = self.groups
        segment = -(-width // groups.context_parallel)  # tokens of a row on this rank
        first = (groups.dp_rank * self.rows + row) * length + groups.rank % groups.context_parallel * segment
        keys = np.random.SeedSequence([self.config.seed, step]).generate_state(len(self.dropouts), np.uint64)
        places = torch.tensor([[key, first, length] for key in keys.view(np.int64).tolist()], device=self.model.device)
        try:
            for module, place in zip(self.dropouts, places, strict=True):
                module.place = place
            yield
        finally:  # otherwise a caller's own loop would get the same mask at every step
            for module in self.dropouts:
                module.place = None

    def _seed(self, step: int) -> None:
        """Seed torch's generator by step and rank, for all randomness other than dropout."""
        seed = self.config.seed << 32 | step
        if not self.groups.is_main:
            seed = int(np.random.SeedSequence([seed, self.groups.rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        torch.manual_seed(seed)

    def _to_device(self, batch: Batch) -> Batch:
        return Batch(*(part.to(self.model.device, non_blocking=True) for part in batch))

    @torch.no_grad()
    def _add_scores(self, score: Score, rows: int, limit: int | None, length: int) -> Iterator[None]:
        """Add this rank's batches of the validation split to a score, one per iteration."""
        self.model.eval()
        for batch, slices in self._rank_batches(self.source.evaluation_batches(rows, limit, length)):
            inputs, targets, cu_seqlens = self.source.packed(self._to_device(batch))
            partitions = self.source.loss_slices(batch)
            with self._autocast():
                output = self.model(
                    inputs,
                    targets=targets,
                    cu_seqlens=cu_seqlens,
                    reduction="none" if partitions else "sum",
                    return_predictions=slices is not None,
                )
            predicted = None if output.predictions is None else output.predictions.cpu()
            assert output.loss is not None
            local_targets = self.model.local_targets(batch.targets)
            score.add(output.loss.sum().item(), local_targets, predicted, slices)
            for axis, partition in partitions.items():
                local = partition._replace(indices=self.model.local_targets(partition.indices))
                score.add_partition(output.loss.view(local_targets.shape).cpu(), local_targets, axis, local)
            yield

    def _rank_batches(self, batches: Iterator[Examples]) -> Iterator[Examples]:
        """Yield this rank's batches, which the ranks take in turn.

        If the last round has no batch for this rank, it gets one without targets, so that all ranks make the same
        collective calls.
        """
        batches = iter(batches)
        rank = self.groups.dp_rank
        while part := list(islice(batches, self.groups.dp_size)):
            batch, slices = part[min(rank, len(part) - 1)]
            if rank >= len(part):
                batch = Batch(batch.inputs, torch.full_like(batch.targets, IGNORED))
            yield Examples(batch, slices)

    def _require_finite(
        self, what: str, value: float, calls: _Calls, describe: _Describe, backward: bool = False
    ) -> None:
        """Raise NotFiniteError if a value is NaN or infinite, and say where that began.

        Args:
            what: name of the value, for the message.
            value: the value, the same on all processes.
            calls: function whose iterator repeats the calls of the model that computed the value, one at a time.
            describe: describes the place in the data where the value became NaN or infinite.
            backward: True to search in the gradients instead of the outputs.
        """
        if math.isfinite(value):
            return
        place = first_module(self.model, calls, backward=backward)
        name = first_gradient(self.model.named_parameters()) if backward else place and place.module
        at = name and f"{'gradient' if backward else 'output'} of {name}"
        # the first rank that located it reports it; other ranks may have only finite shards
        gathered = zip(*self.groups.gather((at, place and describe(place))), strict=True)
        at, sequence = (next(filter(None, each), "") for each in gathered)
        raise NotFiniteError(f"the {what} is {value:g}{at and f', which appears first in the {at}{sequence}'}")

    def _describe_in_batch(self, step: int) -> _Describe:
        """Return the function that describes a place in the batch of a step."""
        rows = self.rows // self.config.training.grad_accum_steps
        length = self.config.data.sequence_length
        origin = partial(self.source.origin, step, self.config.training.batch_size, self.config.seed)
        return partial(self._describe_place, "batch", origin, (rows, length, self.rows, rows))

    def _describe_place(self, of: str, origin: _Origin, sizes: tuple[int, int, int, int], place: Place) -> str:
        """Describe the sequence and token where a value is first not finite, as the end of a sentence.

        Args:
            of: "batch" or "evaluation".
            origin: returns the file and offset of a token.
            sizes: four numbers: sequences per call; tokens per sequence; sequences between the first one of a rank and
                that of the next rank; sequences between the first one of a call and that of the next call.
            place: the module and tokens where the value is first not finite.

        Returns:
            The text; empty if the place has no tokens.
        """
        (rows, length, by_rank, by_call), ranks, tokens = sizes, self.groups.context_parallel, place.tokens
        # documents are packed into one row
        input_rows = 1 if tokens is None or len(tokens) == 1 else rows
        if tokens is None or tokens.shape != (input_rows, rows * length // input_rows // ranks):
            return ""
        row, at = (int(i) for i in tokens.nonzero()[-1 if place.backward else 0])
        # each rank has a segment of every row of the model's input
        at += (row * ranks + self.groups.rank % ranks) * tokens.shape[1]
        row = at // length + self.groups.dp_rank * by_rank + place.call * by_call
        token = at % length
        where = "" if (file_position := origin(row, token)) is None else f" ({file_position})"
        side = f"up to token {token}" if place.backward else f"from token {token} on"
        return f", in sequence {row} of the {of} {side}{where}"
