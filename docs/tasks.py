"""Draw an example of every task, and write what docs/reference/tasks.md says of it: `python docs/tasks.py`.

Pictures are of the generator's own examples: one a task, in docs/tasks/, and small.
"""

from html import escape
from pathlib import Path

import numpy as np

from seqmix.data import DATA, Corpus, Task, TaskConfig
from seqmix.experiments.pages import fill
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
"""Fields of the example of each task."""
_TEXT = np.frombuffer(b"Whatever is to be found lies in a text, and the text says nothing of it. " * 9, dtype=np.uint8)
HAYSTACK = Corpus("a text", 1, "tail", _TEXT.astype(np.uint16), _TEXT.astype(np.uint16))
WIDTH, HEIGHT, MARGIN = 860, 22, 10
"""Of a picture's lines, of a cell, and around them, in pixels."""
PLAIN, ASKED, ANSWER = "#eceff1", "#ffe0b2", "#c8e6c9"


def files() -> dict[Path, str]:
    """The page, with the part that the code says, and a picture of each task."""
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
    """One example as SVG: the tokens that are read, and under those that ask the answers."""
    inputs, targets = (part[0].tolist() for part in task.training_batch(0, 1, seed=0))
    name = task.config.name_of
    cells, x, y = [], MARGIN, MARGIN
    for token, target in zip(inputs, targets, strict=True):
        answer = None if target == IGNORED else name(target)
        width = max(13, *(7 * len(label) + 6 for label in (name(token), answer or "")))
        if x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + 2 * HEIGHT + MARGIN
        cells += _cell(x, y, width, name(token), PLAIN if answer is None else ASKED)
        cells += [] if answer is None else _cell(x, y + HEIGHT, width, answer, ANSWER)
        x += width + 1
    height = y + 2 * HEIGHT + MARGIN
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
    style = "<style>text{font:12px monospace;text-anchor:middle;fill:#263238}</style>"
    title = f"<title>An example of {kind}</title>"
    ground = f'<rect width="{WIDTH}" height="{height}" rx="6" fill="#ffffff"/>'
    return "\n".join([head, title, style, ground, *cells, "</svg>", ""])


def _cell(x: int, y: int, width: int, label: str, color: str) -> list[str]:
    box = f'<rect x="{x}" y="{y}" width="{width}" height="{HEIGHT - 1}" rx="3" fill="{color}"/>'
    return [f'{box}<text x="{x + width / 2:g}" y="{y + 15}">{escape(label)}</text>']


if __name__ == "__main__":
    for file, text in files().items():
        write_file(text, file)
