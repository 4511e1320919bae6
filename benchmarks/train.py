"""The training benchmark: one optimizer step of a whole model, over the sequence length."""

from collections.abc import Iterable

import torch

from ..training.memory import keep_freed_memory, return_freed_memory
from .implementations import ModelBenchmark, ModelImplementation
from .measure import Call
from .peers import Peer
from .suite import Entry


class TrainBenchmark(ModelBenchmark):
    """A call is forward, backward, a clipped gradient, and AdamW; reduced precision by autocast."""

    name = "train"
    title = "A training step of a whole model"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def prepare(self, peer: Peer, *, compiled: bool) -> None:
        if self.settings.activation_checkpointing:
            peer.recompute_activations()
        super().prepare(peer, compiled=compiled)
        peer.optimizer = torch.optim.AdamW(peer.module.parameters(), lr=1e-4, fused=True)

    def rows(self, length: int) -> int:
        return max(1, self.settings.tokens // length)

    def entry(self, implementation: ModelImplementation, length: int) -> Entry:
        batch = self.rows(length)
        tokens = self.tokens(batch, length + 1)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        peer, dtype = implementation.peer, self.settings.dtype
        optimizer = peer.optimizer
        assert optimizer is not None
        peer.module.train()
        freed_memory = keep_freed_memory if peer.keeps_freed_memory else return_freed_memory

        def run() -> None:
            freed_memory()
            with torch.autocast(self.settings.device.type, dtype=dtype, enabled=dtype != torch.float32):
                loss = peer.loss(inputs, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return Entry(
            # the memory that a step finds on a CPU is what the step before has left, which is to be its own
            call=Call(run, run) if self.settings.device.type == "cpu" else Call(run),
            tokens=batch * length,
            parameters=peer.parameters,
            record=None if implementation.compiled else run,
        )

    def notes(self) -> Iterable[str]:
        yield from super().notes()
        yield (
            "Freed memory stays with the process in the steps of seqmix, as `seqmix train` has it, and goes back to "
            "the system in those of the others, as in their own programs. On a CPU every timed step follows one of the "
            "same model that is not timed, as in training."
        )
        yield f"A step has at most {self.settings.tokens:,} tokens, in sequences of T, and one sequence at least."
        if self.settings.activation_checkpointing:
            yield "Activations are recomputed in backward; the products of that count in the floor."
        yield (
            "The share is that of the model's own matrix products timed alone, at their own shapes, forward and "
            "backward; causal attention counts as half of a square. Peak memory is beyond parameters and optimizer."
        )
