"""What a token costs in training, at one length and at another: linear mixers have a ratio near 1.

    python -m seqmix.benchmarks.lengths [SHORT LONG] [--preset NAME ...]

Every tiny preset whose state has a constant size takes optimizer steps of as many tokens in sequences of both lengths,
in turn, on one thread. Times are CPU time, which neighbours on a busy machine stretch least.
"""

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Annotated

import torch
import typer

from ..models import LanguageModel, build_model
from ..training.memory import keep_freed_memory
from .presets import single_kind_presets
from .program import run_program

ROUNDS = 3


def constant_presets() -> list[str]:
    """The presets whose mixer's state does not grow."""
    presets = single_kind_presets().items()
    return [name for name, run in presets if run.model.blocks[run.model.layers[0]].mixer.traits.state == "constant"]


def microseconds(model: LanguageModel, optimizer: torch.optim.Optimizer, length: int, tokens: int) -> float:
    """CPU time a token of one step of `tokens` tokens."""
    x = torch.randint(model.config.vocab_size, (tokens // length, length + 1))
    began = time.process_time()
    model(x[:, :-1].contiguous(), targets=x[:, 1:].contiguous(), reduction="sum").loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return (time.process_time() - began) / tokens * 1e6


def lines(names: Sequence[str], short: int, long: int) -> Iterator[str]:
    """A Markdown table: medians of the rounds, and the median, the lowest and the highest of their ratios."""
    yield f"| preset | us/token at {short:,} | at {long:,} | ratio | from - to |"
    yield "|---|---|---|---|---|"
    for name in names:
        model = build_model(single_kind_presets()[name].model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        microseconds(model, optimizer, short, long)
        rounds = [[microseconds(model, optimizer, length, long) for length in (short, long)] for _ in range(ROUNDS)]
        first, second = (median(times) for times in zip(*rounds, strict=True))
        ratios = sorted(b / a for a, b in rounds)
        spread = f"{ratios[0]:.2f} - {ratios[-1]:.2f}"
        yield f"| `{name}` | {first:.1f} | {second:.1f} | {median(ratios):.2f} | {spread} |"


def main(
    short: Annotated[int, typer.Argument(min=1)] = 2048,
    long: Annotated[int, typer.Argument(help="A multiple of SHORT.", min=1)] = 16384,
    preset: Annotated[list[str] | None, typer.Option(help="Only these.", show_default=False)] = None,
) -> None:
    """Measure, and print a table."""
    if long % short:
        raise typer.BadParameter(f"{long} is no multiple of {short}")
    known = constant_presets()
    for name in preset or ():
        if name not in known:
            raise typer.BadParameter(f"there is no such preset {name!r}; there are {', '.join(known)}")
    torch.set_num_threads(1)
    keep_freed_memory()
    for line in lines(preset or known, short, long):
        print(line, flush=True)


if __name__ == "__main__":
    run_program(main)
