"""The prefill benchmark: reading a prompt, with the state that decoding goes on from."""

from collections.abc import Iterable

import torch

from .implementations import ModelBenchmark, ModelImplementation
from .measure import Call
from .suite import Entry


class PrefillBenchmark(ModelBenchmark):
    """A call reads a prompt; it forms logits of the last token alone where they can be had."""

    name = "prefill"
    title = "Reading a prompt"

    def entry(self, implementation: ModelImplementation, length: int) -> Entry:
        peer, batch = implementation.peer, self.settings.batch
        peer.module.eval()
        tokens = self.tokens(batch, length)

        @torch.no_grad()
        def run() -> None:
            peer.read(tokens)

        return Entry(
            call=Call(run),
            tokens=batch * length,
            parameters=peer.parameters,
            record=None if implementation.compiled else run,
        )

    def notes(self) -> Iterable[str]:
        yield from super().notes()
        yield (
            f"{self.settings.batch} prompt(s) of T tokens, with the state that decoding goes on from. torchscale takes "
            "no part: its parallel modes give no state, and token by token it reads at the speed of `decode`."
        )
