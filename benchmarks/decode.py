"""The decoding benchmark: one token after another, over the number of tokens that were read before."""

from collections.abc import Iterable
from typing import Any

import torch

from .implementations import ModelBenchmark, ModelImplementation
from .measure import Call
from .suite import Entry

STEPS = 16
"""Tokens that one timed call makes."""


class DecodeBenchmark(ModelBenchmark):
    """A call makes several tokens, each the most probable one; states are random numbers."""

    name = "decode"
    title = "Decoding, a token"
    order = 1

    def entry(self, implementation: ModelImplementation, length: int) -> Entry:
        peer, batch = implementation.peer, self.settings.batch
        peer.module.eval()
        with torch.no_grad():
            state: Any = peer.state_after(length, batch, STEPS)
        first = self.tokens(batch, 1)[:, 0]
        moved = peer.moved(state)

        @torch.no_grad()
        def run() -> None:
            # the last state is not kept: one that is a value has not changed, and one that is not is renewed
            tokens, after = first, state
            for _ in range(STEPS):
                logits, after = peer.step(tokens, after)
                tokens = logits.argmax(-1)

        @torch.no_grad()
        def prepare() -> None:
            nonlocal state
            state = peer.renew(state, length)
            run()  # as in the midst of a text: what the last implementation left in the caches is nobody's cost
            state = peer.renew(state, length)

        return Entry(
            call=Call(run, prepare, units=STEPS),
            tokens=batch,
            parameters=peer.parameters,
            state_bytes=sum(x.nbytes for x in peer.tensors(state)),
            moved=moved,
        )

    def notes(self) -> Iterable[str]:
        yield from super().notes()
        yield (
            f"{self.settings.batch} sequence(s); {STEPS} greedy tokens a call, after a context of T tokens whose "
            f"state is random numbers, and after {STEPS} that are not timed, as in the midst of a text. Peak memory is "
            "beyond parameters and state, over a call."
        )
        yield (
            "The share is that of the time in which memory moves what a token needs, at the machine's copy rate: "
            "weights and cache read, a state of constant size read and written. Weights that stay in the processor's "
            "cache can be above it."
        )
