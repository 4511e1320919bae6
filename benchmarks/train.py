"""The training benchmark: one optimizer step of a whole model, over the sequence length."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..training.memory import keep_freed_memory, return_freed_memory
from .contestants import ModelBenchmark, ModelContestant
from .measure import Call
from .peers import Competitor
from .suite import Entry


def make_ready(competitor: Competitor, *, compiled: bool, checkpointed: bool) -> None:
    """Compile a model, or let backward compute its layers anew: ours as `seqmix train` does, others layer by layer."""
    if checkpointed and hasattr(competitor.module, "activation_checkpointing"):
        competitor.module.activation_checkpointing = True
    elif checkpointed:
        for layer in competitor.layers:
            layer.forward = _anew(layer.forward)
    if compiled:
        competitor.compile("train")


def _anew(forward: Callable[..., Any]) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return function


class TrainContestant(ModelContestant):
    """Forward, backward, a clipped gradient, and AdamW; reduced precision by autocast."""

    role = "train"
    _optimizer: torch.optim.Optimizer | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def prepare(self, competitor: Competitor) -> None:
        make_ready(competitor, compiled=self.compiled, checkpointed=self.settings.checkpoint)
        self._optimizer = torch.optim.AdamW(competitor.module.parameters(), lr=1e-4, fused=True)

    def release(self) -> None:
        self._optimizer = None
        super().release()

    def rows(self, length: int) -> int:
        return max(1, self.settings.tokens // length)

    def entry(self, length: int) -> Entry:
        batch = self.rows(length)
        tokens = self.tokens(batch, length + 1)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        competitor, dtype = self.competitor, self.settings.dtype
        optimizer = self._optimizer
        assert optimizer is not None
        competitor.module.train()
        freed_memory = keep_freed_memory if competitor.keeps_freed_memory else return_freed_memory

        def run() -> None:
            freed_memory()
            with torch.autocast(self.settings.device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = competitor.loss(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(competitor.module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return Entry(
            # the memory that a step finds on a CPU is what the step before has left, which is to be its own
            call=Call(run, run) if self.settings.device.type == "cpu" else Call(run),
            tokens=batch * length,
            parameters=competitor.parameters,
            record=None if self.compiled else run,
        )


class TrainBenchmark(ModelBenchmark):
    """Training steps."""

    name = "train"
    title = "A training step of a whole model"
    contestant = TrainContestant

    def notes(self) -> Iterable[str]:
        yield from super().notes()
        yield (
            "Freed memory stays with the process in the steps of seqmix, as `seqmix train` has it, and goes back to "
            "the system in those of the others, as in their own programs. On a CPU every timed step follows one of the "
            "same model that is not timed, as in training."
        )
        yield f"A step has at most {self.settings.tokens:,} tokens, in sequences of T, and one sequence at least."
        if self.settings.checkpoint:
            yield "Layers are computed anew in backward; the products of that count in the floor."
        yield (
            "The share is that of the model's own matrix products timed alone, at their own shapes, forward and "
            "backward; causal attention counts as half of a square. Peak memory is beyond parameters and optimizer."
        )
