"""The prefill benchmark: reading a prompt, with the state that decoding goes on from."""

from collections.abc import Iterable

import torch

from .contestants import ModelBenchmark, ModelContestant
from .measure import Call
from .suite import Entry


class PrefillContestant(ModelContestant):
    """Reads a prompt; logits of its last token alone where they can be had."""

    role = "prefill"

    def entry(self, length: int) -> Entry:
        competitor, batch = self.competitor, self.settings.batch
        competitor.module.eval()
        tokens = self.tokens(batch, length)

        @torch.no_grad()
        def run() -> None:
            competitor.read(tokens)

        return Entry(
            call=Call(run),
            tokens=batch * length,
            parameters=competitor.parameters,
            record=None if self.compiled else run,
        )


class PrefillBenchmark(ModelBenchmark):
    """Reading prompts."""

    name = "prefill"
    title = "Reading a prompt"
    contestant = PrefillContestant

    def notes(self) -> Iterable[str]:
        yield from super().notes()
        yield (
            f"{self.settings.batch} prompt(s) of T tokens, with the state that decoding goes on from. torchscale takes "
            "no part: its parallel modes give no state, and token by token it reads at the speed of `decode`."
        )
