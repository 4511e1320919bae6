"""Write the table of the coordinate check in docs/how-to/training.md: `python docs/coordinates.py`.

Each tiny preset trains at three widths, with muP and with the standard parametrization, ten steps for each of three
seeds. A cell is the exponent of the width by which an activation grows.
"""

from pathlib import Path

import torch

from seqmix import SeqmixError, load_config
from seqmix.experiments.coordinates import Coordinate, coordinates
from seqmix.experiments.pages import fill, table
from seqmix.registry import write_file
from seqmix.training.presets import single_kind_presets

TARGET = Path(__file__).with_name("how-to") / "training.md"
WIDTHS = (64, 128, 256)
SEEDS = 3
CHANGES = ("model.n_layers=2", "data.sequence_length=64", "training.learning_rate=0.003")
MUP = "model.parametrization={kind: mup, base_width: 64}"


def exponents(preset: str, *changes: str) -> list[Coordinate]:
    """Return the activations of a preset's models."""
    return coordinates(load_config(preset, [*CHANGES, *changes]), WIDTHS, seeds=SEEDS)


def largest(activations: list[Coordinate], prefix: str) -> str:
    """Return the exponent farthest from 0 among the activations whose name begins with `prefix`."""
    values = [activation.exponent for activation in activations if activation.part.startswith(prefix)]
    return f"{max(values, key=abs):+.2f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = []
    for preset in single_kind_presets():
        name = f"`{preset.removesuffix('-tiny')}`"
        try:
            scaled, standard = exponents(preset, MUP), exponents(preset)
        except SeqmixError as error:
            print(f"{preset}: {error}", flush=True)  # noqa: T201
            continue
        parts = [largest(scaled, part) for part in ("mixer", "ffn", "stream", "logits")]
        rows.append([name, *parts, largest(standard, "stream"), largest(standard, "logits")])
        print(*rows[-1], flush=True)  # noqa: T201
    head = ["mixer", "mixer's output:", "FFN's output:", "residual stream:", "logits:", "standard, stream:", "logits:"]
    write_file(fill(TARGET, {"coordinates": table(head, rows)}), TARGET)
