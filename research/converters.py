"""Compare every converted model with the original library's model, and write the table of docs/how-to/convert.md.

    pip install transformers; pip install --no-deps torchscale fla-core flash-linear-attention
    python research/converters.py

The models are the tiny, random ones of tests/peers. They run in every paradigm of their mixers: the whole sequence at
once, packed, and in pieces.
"""

import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from seqmix.interop.convert import ARCHITECTURES
from seqmix.lab.markdown import fill, table
from seqmix.registry import write_file
from seqmix.research import DOCS

PAGE = DOCS / "how-to" / "convert.md"
MODULES = ("test_convert_transformers", "test_convert_fla", "test_convert_torchscale")


def largest_differences(dtype: torch.dtype) -> dict[str, float]:
    """Return the largest logit difference over all cases of each architecture, relative to the largest logit."""
    largest: dict[str, float] = {}
    for module in (import_module(f"peers.{name}") for name in MODULES):
        for case in module.CASES:
            with TemporaryDirectory() as folder:
                result, _ = module.measured(case, dtype, Path(folder))
            name = case.partition(",")[0]
            if not case.endswith("no eps"):
                largest[name] = max(largest.get(name, 0.0), *result.worst.values())
    return largest


def rows() -> list[tuple[str, ...]]:
    """Return the rows of the table."""
    single = largest_differences(torch.float32)
    double = largest_differences(torch.float64)
    architectures = sorted(ARCHITECTURES.values(), key=lambda each: (each.library, each.name))
    return [
        (
            f"`{each.name}`",
            f"{each.library} `{each.class_name}`",
            ", ".join(f"`{kind}`" for kind in each.mixers),
            f"{single[each.name]:.0e}",
            f"{double[each.name]:.0e}",
        )
        for each in architectures
    ]


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1] / "tests")  # in place of research/, whose peers.py hides tests/peers
    heads = ["`--as`", "library and class", "mixers", "float32", "float64"]
    write_file(fill(PAGE, {"converters": table(heads, rows())}), PAGE)
