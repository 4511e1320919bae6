"""What a decoded token costs behind contexts that take turns: a state of constant size has one cost.

    python -m seqmix.benchmarks.flat_decoding [CONTEXT ...] [--rounds N] [--no-compile]

`seqmix bench decode` measures one context after another, so a machine that becomes slower in between tilts its figures;
here every round has all contexts, in an order that turns. The model is that benchmark's RetNet of 20M parameters.
"""

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Annotated

import torch
import typer

from ..commands.bench import model_to_measure
from ..mixers.state import to_dict
from ..models import Decoder, build_model
from .measure import turns
from .program import run_program

CONTEXTS = (64, 1024, 8192, 65536)
TOKENS = 64
"""Of a timed call."""


@torch.no_grad()
def milliseconds(decoder: Decoder, context: int) -> float:
    """Time of a token, greedily chosen, behind a context whose state is random numbers."""
    for leaf in to_dict(decoder.state).values():
        leaf.normal_() if leaf.is_floating_point() else leaf.fill_(context)
    token = torch.zeros(1, dtype=torch.long)
    began = time.perf_counter()
    for _ in range(TOKENS):
        token = decoder.step(token).argmax(-1)
    return (time.perf_counter() - began) / TOKENS * 1e3


def lines(contexts: Sequence[int], rounds: int, *, compiled: bool) -> Iterator[str]:
    """A Markdown table: medians of the rounds, and the ratio of each context's time to the first one's, by rounds."""
    model = build_model(model_to_measure(None, ()), seed=0).eval()
    decoders = {
        context: Decoder(model, model.init_state(1, max_length=context + TOKENS), compiled=compiled)
        for context in contexts
    }
    for context, decoder in decoders.items():
        milliseconds(decoder, context)
    times: dict[int, list[float]] = {context: [] for context in contexts}
    for order in turns([str(context) for context in contexts], rounds):
        for context in map(int, order):
            times[context].append(milliseconds(decoders[context], context))
    yield "| tokens read before | ms a token | ratio | from - to |"
    yield "|---|---|---|---|"
    for context, found in times.items():
        ratios = sorted(own / first for own, first in zip(found, times[contexts[0]], strict=True))
        yield f"| {context:,} | {median(found):.2f} | {median(ratios):.2f} | {ratios[0]:.2f} - {ratios[-1]:.2f} |"


def main(
    contexts: Annotated[list[int] | None, typer.Argument(min=1, show_default=False)] = None,
    rounds: Annotated[int, typer.Option(min=5)] = 15,
    compile: Annotated[bool, typer.Option(help="Whether a step is compiled, as for long texts.")] = True,
) -> None:
    """Measure, and print a table."""
    for line in lines(contexts or CONTEXTS, rounds, compiled=compile):
        print(line, flush=True)


if __name__ == "__main__":
    run_program(main)
