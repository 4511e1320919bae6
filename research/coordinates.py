"""Write the table of the coordinate check in docs/how-to/training.md: `python research/coordinates.py`.

Each tiny preset trains with muP at three widths, ten steps for each of three seeds. A cell is the exponent of the width
in the size of an activation.
"""

import torch

from seqmix import load_config
from seqmix.lab.coordinates import Coordinate, coordinates
from seqmix.lab.markdown import fill, table
from seqmix.registry import write_file
from seqmix.research import DOCS
from seqmix.training.presets import single_kind_presets

TARGET = DOCS / "how-to" / "training.md"
WIDTHS = (64, 128, 256)
SEEDS = 3
CHANGES = (
    "model.n_layers=2",
    "data.sequence_length=64",
    "training.learning_rate=0.003",
    "model.parametrization={kind: mup, base_width: 64}",
)


def largest(activations: list[Coordinate], prefix: str) -> str:
    """Return the exponent farthest from 0 among the activations whose name begins with `prefix`; bold if it is not
    flat."""
    found = [activation for activation in activations if activation.part.startswith(prefix)]
    if not found:  # a block without an FFN
        return ""
    farthest = max(found, key=lambda activation: abs(activation.exponent))
    return f"{farthest.exponent:+.2f}" if farthest.verdict == "flat" else f"**{farthest.exponent:+.2f}**"


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = []
    for preset in single_kind_presets():
        name = f"`{preset.removesuffix('-tiny')}`"
        activations = coordinates(load_config(preset, CHANGES), WIDTHS, seeds=SEEDS)
        rows.append([name, *(largest(activations, part) for part in ("mixer", "ffn", "stream", "logits"))])
        print(*rows[-1], flush=True)  # noqa: T201
    head = ["mixer", "mixer's output:", "FFN's output:", "residual stream:", "logits:"]
    write_file(fill(TARGET, {"coordinates": table(head, rows)}), TARGET)
