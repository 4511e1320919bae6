"""The decoding benchmark: one token after another, over the number of tokens that were read before."""

from collections.abc import Iterable
from typing import Any

import torch

from .contestants import ModelBenchmark, ModelContestant
from .measure import Call
from .suite import Entry

STEPS = 16
"""Tokens that one timed call makes."""


class DecodeContestant(ModelContestant):
    """A call makes several tokens, each the most probable one; states are random numbers."""

    role = "decode"

    def entry(self, length: int) -> Entry:
        competitor, batch = self.competitor, self.settings.batch
        competitor.module.eval()
        with torch.no_grad():
            state: Any = competitor.state_after(length, batch, STEPS)
        first = self.tokens(batch, 1)[:, 0]
        moved = competitor.moved(state)

        @torch.no_grad()
        def run() -> None:
            # the last state is not kept: one that is a value has not changed, and one that is not is renewed
            tokens, after = first, state
            for _ in range(STEPS):
                logits, after = competitor.step(tokens, after)
                tokens = logits.argmax(-1)

        @torch.no_grad()
        def prepare() -> None:
            nonlocal state
            state = competitor.renew(state, length)
            run()  # as behind the tokens before: what the last contestant left in the caches is nobody's cost
            state = competitor.renew(state, length)

        return Entry(
            call=Call(run, prepare, units=STEPS),
            tokens=batch,
            parameters=competitor.parameters,
            state_bytes=sum(x.nbytes for x in competitor.tensors(state)),
            moved=moved,
        )


class DecodeBenchmark(ModelBenchmark):
    """Decoding."""

    name = "decode"
    title = "Decoding, a token"
    order = 1
    contestant = DecodeContestant

    def notes(self) -> Iterable[str]:
        yield from super().notes()
        yield (
            f"{self.settings.batch} sequence(s); {STEPS} greedy tokens a call, behind a context of T tokens whose "
            f"state is random numbers, and after {STEPS} that are not timed, as in the midst of a text. Peak memory is "
            "beyond parameters and state, over a call."
        )
        yield (
            "The share is that of the time in which memory moves what a token needs, at the machine's copy rate: "
            "weights and cache read, a state of constant size read and written. Weights that stay in the processor's "
            "cache can be above it."
        )
