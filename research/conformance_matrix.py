"""Test other libraries on the conformance vectors, and write the tables of docs/explanation/conformance-matrix.md.

The page says which packages are needed.
"""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from seqmix.lab.markdown import fill, table
from seqmix.registry import write_file
from seqmix.research import DOCS
from seqmix.testing.vectors.families import FAMILIES
from seqmix.testing.vectors.write import write_vectors

PAGE = DOCS / "explanation" / "conformance-matrix.md"
ADAPTERS = Path(__file__).parents[1] / "examples" / "vectors"

RECURRENCES = {
    "one token": "one token",
    "chunk + 1": "chunk + 1",
    "odd widths": "odd widths",
    "grouped heads": "grouped heads",
    "state in": "state in",
    "state out": "state out",
    "packed": "packed",
    "empty documents": "empty documents",
    "log-decay -inf": "-inf",
    "strong decay": "strong decay",
    "weak decay": "weak decay",
    "long": "long",
    "gradients": "gradients",
    "gradients through states": "gradients through states",
}
"""Properties of recurrences with the heads of their columns; the page names those that are left out."""
ATTENTION = {
    name: name
    for name in (
        *("one token", "chunk + 1", "odd widths", "grouped heads", "large scores", "state in", "packed"),
        *("empty documents", "window", "sinks", "soft cap", "ALiBi", "forget gates", "key decay", "long", "gradients"),
    )
}
"""Properties of attention."""


class Implementation(NamedTuple):
    """An implementation: its name on the page, its package, and its adapter."""

    name: str
    package: str
    adapter: str
    softmax: bool = False
    """True if it stands in the table of attention."""


IMPLEMENTATIONS = (
    Implementation("LinearAttention, reference evaluator", "onnx", "onnx_ops.py:reference"),
    Implementation("LinearAttention, CPU", "onnxruntime", "onnx_ops.py:onnxruntime_cpu"),
    Implementation("Qwen3-Next, chunks", "transformers", "transformers_torch.py:gated_delta_chunk"),
    Implementation("Qwen3-Next, recurrent", "transformers", "transformers_torch.py:gated_delta_recurrent"),
    Implementation("Kimi Linear, chunks", "transformers", "transformers_torch.py:kda_chunk"),
    Implementation("Kimi Linear, recurrent", "transformers", "transformers_torch.py:kda_recurrent"),
    Implementation("Mamba", "transformers", "transformers_torch.py:mamba"),
    Implementation("Mamba-2, chunks", "transformers", "transformers_torch.py:mamba2"),
    Implementation("RecurrentGemma", "transformers", "transformers_torch.py:rg_lru"),
    Implementation("naive, recurrent", "fla-core", "fla_naive.py:recurrent"),
    Implementation("naive, chunks", "fla-core", "fla_naive.py:chunk"),
    Implementation("retention, parallel", "torchscale", "torchscale_retention.py:parallel"),
    Implementation("retention, recurrent", "torchscale", "torchscale_retention.py:recurrent"),
    Implementation("pscan, selective scan", "mambapy", "scans.py:mambapy"),
    Implementation("scan in the log domain", "minGRU-pytorch", "scans.py:min_gru"),
    Implementation("mLSTM, parallel", "xlstm", "xlstm_native.py:parallel"),
    Implementation("mLSTM, chunks", "xlstm", "xlstm_native.py:chunkwise"),
    Implementation("mLSTM, recurrent", "xlstm", "xlstm_native.py:recurrent"),
    Implementation("reference, chunks", "seqmix", "seqmix_ops.py:reference"),
    Implementation("reference, recurrent", "seqmix", "seqmix_ops.py:recurrent"),
    Implementation("native, chunks", "seqmix", "seqmix_ops.py:native"),
    Implementation("Attention, reference evaluator", "onnx", "onnx_ops.py:reference", softmax=True),
    Implementation("Attention, CPU", "onnxruntime", "onnx_ops.py:onnxruntime_cpu", softmax=True),
    Implementation("scaled_dot_product_attention", "torch", "torch_attention.py:sdpa", softmax=True),
    Implementation("flex_attention, not compiled", "torch", "torch_attention.py:flex", softmax=True),
    Implementation("naive attention", "fla-core", "fla_naive.py:attention", softmax=True),
    Implementation("reference", "seqmix", "seqmix_ops.py:reference", softmax=True),
)
"""All implementations, in the order of the page."""


def package_version(package: str) -> str:
    """Return the installed version of a package."""
    return version(package).partition("+")[0]


def missing_packages() -> list[str]:
    """Return the packages that are not installed."""
    missing = []
    for package in dict.fromkeys(each.package for each in IMPLEMENTATIONS):
        try:
            version(package)
        except PackageNotFoundError:
            missing.append(package)
    return missing


CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import runner
folder = runner.Path(sys.argv[1])
loaded = {name: runner.load_implementation(name) for name in sys.argv[3:]}
families = {name: [f for f in json.loads(sys.argv[2]) if hasattr(x, f)] for name, x in loaded.items()}
results = {name: runner.run(x, folder, families=families[name]) for name, x in loaded.items()}
runner.Path(folder / "results.json").write_text(json.dumps(results))
"""
"""Program that runs several implementations by the runner beside the vectors."""


def run_all(vectors: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the results of every adapter; those of one file run in one process, apart from other files."""
    results: dict[str, list[dict[str, Any]]] = {}
    adapters = dict.fromkeys(str(ADAPTERS / each.adapter) for each in IMPLEMENTATIONS)
    for file, names in groupby(sorted(adapters), key=lambda name: name.partition(":")[0]):
        sys.stderr.write(f"{Path(file).name}\n")
        command = [sys.executable, "-c", CHILD, str(vectors), json.dumps([*FAMILIES]), *names]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            sys.exit(f"{file} did not run:\n{ended.stderr}")
        results |= json.loads((vectors / "results.json").read_text(encoding="utf-8"))
    return {str(Path(name).relative_to(ADAPTERS)): found for name, found in results.items()}


def cell(results: Sequence[dict[str, Any]], name: str) -> str:
    """Return the cell of a property."""
    counts = Counter(result["status"] for result in results if result["property"] == name)
    offered = counts["passed"] + counts["failed"]
    if not offered:
        return "-"
    return f"**{counts['failed']} of {offered}**" if counts["failed"] else "yes"


def matrix(results: dict[Implementation, list[dict[str, Any]]]) -> list[str]:
    """Return the lines of both tables."""
    lines = []
    for softmax, heading, columns in ((False, "Recurrences", RECURRENCES), (True, "Attention", ATTENTION)):
        rows = [
            (f"{each.package} {package_version(each.package)}", each.name, *(cell(found, name) for name in columns))
            for each, found in results.items()
            if each.softmax == softmax
        ]
        lines += [f"### {heading}", "", *table(["package", "what", *columns.values()], rows), ""]
    return [*lines, f"Made on {date.today().isoformat()} by `research/conformance_matrix.py`."]


def failures(results: dict[Implementation, list[dict[str, Any]]]) -> list[str]:
    """Return the lines of the table of failures: cases by implementation, and the properties that fail there."""
    rows = []
    for each, found in results.items():
        cases: dict[str, list[str]] = {}
        for result in found:
            if result["status"] == "failed":
                cases.setdefault(result["id"], []).append(result["property"])
        by_properties: dict[str, list[str]] = {}
        for case, properties in cases.items():
            by_properties.setdefault(", ".join(properties), []).append(f"`{case}`")
        rows += [(f"{each.package}: {each.name}", ", ".join(ids), wrong) for wrong, ids in by_properties.items()]
    return table(["implementation", "cases", "wrong there"], rows)


def files() -> dict[Path, str]:
    """Return the text of the page."""
    with TemporaryDirectory() as folder:
        write_vectors(Path(folder))
        by_adapter = run_all(Path(folder))
    results = {
        each: [r for r in by_adapter[each.adapter] if (r["family"] == "softmax") == each.softmax]
        for each in IMPLEMENTATIONS
    }
    return {PAGE: fill(PAGE, {"matrix": matrix(results), "failures": failures(results)})}


if __name__ == "__main__":
    if missing := missing_packages():
        sys.exit(f"the conformance matrix needs {', '.join(missing)}: {PAGE.name} says how to install them")
    for page, text in files().items():
        write_file(text, page)
