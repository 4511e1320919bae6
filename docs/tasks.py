"""Draw an example of every task, and write the task sections of docs/reference/tasks.md: `python docs/tasks.py`.

The pictures, one per task, are written to docs/reference/tasks/. They show generated examples of a small size.
"""

from html import escape
from pathlib import Path

import numpy as np

from seqmix.data import DATA, Corpus, Task, TaskConfig
from seqmix.lab.markdown import fill
from seqmix.models import IGNORED
from seqmix.registry import write_file

PAGES = Path(__file__).with_name("reference")
TARGET, PICTURES = PAGES / "tasks.md", PAGES / "tasks"
SMALL = {
    "compression": {"sequence_length": 16},
    "copying": {"sequence_length": 16, "lengths": (7,)},
    "fuzzy_recall": {"sequence_length": 40},
    "in_context_recall": {"sequence_length": 24, "noise_tokens": 4},
    "induction_heads": {"sequence_length": 18},
    "listops": {"sequence_length": 24},
    "memorization": {"sequence_length": 16, "vocab_size": 16},
    "modular_arithmetic": {"sequence_length": 24, "brackets": True},
    "mqar": {"sequence_length": 24, "pairs": (4,), "vocab_size": 32},
    "parity": {"sequence_length": 20},
    "passkey": {"sequence_length": 132, "depths": (50,)},
    "permutation": {"sequence_length": 12},
    "ruler": {"sequence_length": 192},
    "selective_copying": {"sequence_length": 20, "symbols": (5,)},
}
"""Configuration fields of the example of each task."""
_TEXT = np.frombuffer(b"The number is hidden in a text that has nothing to do with the question. " * 9, dtype=np.uint8)
HAYSTACK = Corpus("a text", 1, "tail", _TEXT.astype(np.uint16), _TEXT.astype(np.uint16))
"""The text in which the passkey example is hidden."""
WIDTH = 860
"""Width of a picture in pixels."""
HEIGHT = 22
"""Height of a cell in pixels."""
MARGIN = 10
"""Margin around and between lines in pixels."""
PLAIN, WITH_TARGET, ANSWER = "#eceff1", "#ffe0b2", "#c8e6c9"
"""Colours of the cells of inputs, of inputs with a target, and of targets."""


def files() -> dict[Path, str]:
    """Return the text of the page with its generated sections, and the picture of each task."""
    lines: list[str] = []
    pictures = {}
    for kind, config in DATA.built_in().items():
        if not issubclass(config, TaskConfig):
            continue
        fields = [name for name in config.model_fields if name not in ("kind", "evaluate_at", "evaluation_examples")]
        lines += [f"### {kind}", "", " ".join((config.__doc__ or "").split()), ""]
        lines += [f"![An example of {kind}](tasks/{kind}.svg)", ""]
        lines += [f"Difficulty: `{config.axis}`. Fields: {', '.join(f'`{name}`' for name in fields)}.", ""]
        task = Task(config(**SMALL.get(kind, {})), HAYSTACK if kind == "passkey" else None)
        pictures[PICTURES / f"{kind}.svg"] = picture(kind, task)
    return {TARGET: fill(TARGET, {"tasks": lines[:-1]}), **pictures}


def picture(kind: str, task: Task) -> str:
    """Return one example as SVG: a row of input tokens, with the targets below."""
    inputs, targets = (part[0].tolist() for part in task.training_batch(0, 1, seed=0))
    name = task.config.name_of
    cells = []
    x = y = MARGIN
    for token, target in zip(inputs, targets, strict=True):
        answer = None if target == IGNORED else name(target)
        width = max(13, *(7 * len(label) + 6 for label in (name(token), answer or "")))
        if x + width > WIDTH - MARGIN:  # start a new line
            x = MARGIN
            y += 2 * HEIGHT + MARGIN
        cells += _cell(x, y, width, name(token), PLAIN if answer is None else WITH_TARGET)
        cells += [] if answer is None else _cell(x, y + HEIGHT, width, answer, ANSWER)
        x += width + 1
    height = y + 2 * HEIGHT + MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
    style = "<style>text{font:12px monospace;text-anchor:middle;fill:#263238}</style>"
    title = f"<title>An example of {kind}</title>"
    background = f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#ffffff"/>'
    return "\n".join([head, title, style, background, *cells, "</svg>", ""])


def _cell(x: int, y: int, width: int, label: str, color: str) -> list[str]:
    box = f'<rect x="{x}" y="{y}" width="{width}" height="{HEIGHT - 1}" rx="3" fill="{color}"/>'
    return [f'{box}<text x="{x + width / 2:g}" y="{y + 15}">{escape(label)}</text>']


if __name__ == "__main__":
    for file, text in files().items():
        write_file(text, file)
