"""Measure every converter beside the other library's own model, and write the table of docs/how-to/convert.md.

    pip install transformers; pip install --no-deps torchscale fla-core flash-linear-attention
    python docs/converters.py

The models are those of tests/peers: tiny, random, in every paradigm that their mixers have, whole, packed, in pieces.
"""

import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from seqmix.convert import ARCHITECTURES
from seqmix.experiments.pages import fill, table
from seqmix.registry import write_file

PAGE = Path(__file__).with_name("how-to") / "convert.md"
MODULES = ("test_convert_transformers", "test_convert_fla", "test_convert_torchscale")


def worst(dtype: torch.dtype) -> dict[str, float]:
    """The largest difference of each architecture's cases, over the largest logit."""
    found: dict[str, float] = {}
    for module in (import_module(f"peers.{name}") for name in MODULES):
        for case in module.CASES:
            with TemporaryDirectory() as folder:
                result, _ = module.measured(case, dtype, Path(folder))
            name, without_eps = case.partition(",")[0], case.endswith("no eps")
            if not without_eps:
                found[name] = max(found.get(name, 0.0), *result.worst.values())
    return found


def rows() -> list[tuple[str, ...]]:
    """The table."""
    single, double = worst(torch.float32), worst(torch.float64)
    known = sorted(ARCHITECTURES.values(), key=lambda each: (each.library, each.name))
    return [
        (
            f"`{each.name}`",
            f"{each.library} `{each.class_name}`",
            ", ".join(f"`{kind}`" for kind in each.mixers),
            f"{single[each.name]:.0e}",
            f"{double[each.name]:.0e}",
        )
        for each in known
    ]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    heads = ["`--as`", "of", "mixers", "float32", "float64"]
    write_file(fill(PAGE, {"converters": table(heads, rows())}), PAGE)
