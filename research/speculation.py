"""Write the table of speculative decoding in docs/how-to/generation.md: `python research/speculation.py`.

The text is source code of Python's standard library: a guess is right if it is the file's next byte, whatever the model
says. So the table shows how fast a model decodes that would write such code, and one with random weights will do. Times
are CPU time of one thread; plain and speculative decoding take turns.
"""

import statistics
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from seqmix import LanguageModel, Sampling, build_model, load_config
from seqmix.lab.markdown import fill, table
from seqmix.models import Decoder, Speculation, prefill
from seqmix.models.sampling import Sampler
from seqmix.models.speculation import Speculator
from seqmix.registry import write_file
from seqmix.research import DOCS

TARGET = DOCS / "how-to" / "generation.md"
FILES = ("argparse.py", "tarfile.py", "inspect.py")
PROMPT, NEW = 8000, 400
PRESETS = ("retnet-tiny", "attention-tiny", "gated-delta-net-tiny", "mamba2-tiny")
SIZES = {"1M": [], "20M": ["model.d_model=512", "model.n_layers=6"]}


class Dictated(Sampler):
    """Samples what a text says."""

    def __init__(self, text: Sequence[int]) -> None:
        super().__init__(Sampling(temperature=0), 1, torch.device("cpu"))
        self._text = list(text)

    def tokens_at(self, logits: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
        """Return the text's next tokens."""
        del logits
        return torch.tensor([self._text[ahead] for _, ahead in places])

    def advance(self, row: int, tokens: int) -> None:
        """Go on in the text."""
        del row
        del self._text[:tokens]


def plain_seconds(model: LanguageModel, state: tuple, text: Sequence[int], compiled: bool) -> float:
    """Return the CPU time per token of plain decoding."""
    decoder = Decoder(model, state, compiled=compiled)
    start = time.process_time()
    for token in text:
        decoder.step(torch.tensor([token])).argmax(-1)
    return (time.process_time() - start) / len(text)


def speculative_seconds(
    model: LanguageModel, state: tuple, prompt: Sequence[int], text: Sequence[int], compiled: bool
) -> tuple[float, Speculation]:
    """Return the CPU time per token of speculative decoding, and its counts."""
    speculation = Speculation()
    speculator = Speculator(
        model, state, [prompt], [text[0]], Dictated(text[1:]), speculation,
        max_new_tokens=NEW, vocab_size=None, compiled=compiled,
    )  # fmt: skip
    start = time.process_time()
    for _ in speculator.steps():
        pass
    return (time.process_time() - start) / NEW, speculation


def row(preset: str, size: str) -> list[str]:
    """Measure one model; return its row of the table."""
    model = build_model(load_config(preset, SIZES[size]).model).eval()
    ratios: dict[bool, list[float]] = {False: [], True: []}
    plain: dict[bool, list[float]] = {False: [], True: []}
    counts = [0, 0, 0]
    library = Path(sysconfig.get_path("stdlib"))
    for repetition, name in enumerate((FILES[0], *FILES)):  # the first file warms up and compiles
        source = list((library / name).read_bytes()[4000 : 4000 + PROMPT + NEW + 64])
        prompt, text = source[:PROMPT], source[PROMPT : PROMPT + NEW]
        for compiled in ratios:
            _, state = prefill(model, [torch.tensor(prompt)], max_length=PROMPT + NEW + 64)
            _, other = prefill(model, [torch.tensor(prompt)], max_length=PROMPT + NEW + 64)
            with torch.no_grad():
                seconds, speculation = speculative_seconds(model, other, prompt, source[PROMPT:], compiled)
                before = plain_seconds(model, state, text, compiled)
            if repetition:
                ratios[compiled].append(before / seconds)
                plain[compiled].append(before)
            if repetition and not compiled:
                pair = (speculation.calls, speculation.drafted, speculation.accepted)
                counts = [total + new for total, new in zip(counts, pair, strict=True)]
    calls, drafted, accepted = counts
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    cells = [f"{1e3 * statistics.median(plain[c]):.1f} ms, {statistics.median(ratios[c]):.2f} x" for c in (False, True)]
    return [f"`{preset.removesuffix('-tiny')}`", f"{millions:.1f}M", f"{100 * accepted / drafted:.0f} %",
            f"{1 + accepted / calls:.2f}", *cells]  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    head = ["mixer", "parameters:", "right guesses:", "tokens a call:", "eager, faster by:", "compiled, faster by:"]
    rows = []
    for size in SIZES:
        for preset in PRESETS:
            rows.append(row(preset, size))
            print(rows[-1], flush=True)  # noqa: T201
    write_file(fill(TARGET, {"speculation": table(head, rows)}), TARGET)
