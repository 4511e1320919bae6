"""Writing of conformance vectors: an index with its JSON schema, one safetensors file per family, and the runner."""

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from ...ops.runtime.kernel import KERNELS, Kernel
from ...registry import DataError, is_vacant, write_files
from ..kernel.scans import LogScanCase
from .cases import VectorCase, vector_cases
from .families import FAMILIES, NOTATION

FORMAT = 1
"""Version of the files' format; it changes when a reader of the old format would misread the files."""

TOLERANCES = {"float64": 1e-13, "float32": 2e-5}
"""Allowed error of a tensor's elements, by dtype of the computation, relative to the tensor's `scale`. The kernels of
this library, whose own tolerances are at most these, stay below a tenth of them."""

RULE = (
    "An element is right if |actual - expected| <= tolerance * scale. The scale is that of its tensor: the largest sum "
    "of the absolute values of the terms that one element adds up; for gradients of log-decays per token, also of the "
    "terms of all later tokens, which cancel if sums are subtracted. The tolerance is that of the dtype in which you "
    "compute, at least ten times the largest error that the kernels of seqmix have on these vectors: room for another "
    "order of the same sums, not for another formula."
)

HERE = Path(__file__).parent
SCHEMA, RUNNER = "index.schema.json", "runner.py"
"""Files that are written as they are."""


def write_vectors(folder: Path, families: tuple[str, ...] = ()) -> int:
    """Write the vectors of some families (none named: all) to a folder, and return the number of cases.

    The same version of seqmix and torch writes the same bytes on the same machine.

    Raises:
        SeqmixError: a family is unknown, or the folder exists and is not empty.
    """
    cases = list(vector_cases(families))
    used = list(dict.fromkeys(case.family for case in cases))
    if not is_vacant(folder):
        raise DataError(f"expected a new or empty folder, got {folder}: delete it first, or give another name")
    folder.mkdir(parents=True, exist_ok=True)  # fails before the work if it cannot be written
    tensors: dict[str, dict[str, np.ndarray]] = {family: {} for family in used}
    entries = []
    for case in cases:
        entry, parts = evaluate(case)
        entries.append(entry)
        tensors[case.family] |= {f"{case.id}/{name}": x for name, x in parts.items()}
    index = {
        "$schema": SCHEMA,
        "format": FORMAT,
        "seqmix": import_module((__package__ or "seqmix").partition(".")[0]).__version__,
        "notation": NOTATION,
        "rule": RULE,
        "tolerances": TOLERANCES,
        "families": {
            name: {
                "recurrence": FAMILIES[name].recurrence,
                "tensors": FAMILIES[name].tensors,
                "file": f"{name}.safetensors",
            }
            for name in used
        },
        "cases": entries,
    }
    files: dict[Path, str | bytes] = {folder / f"{name}.safetensors": save(parts) for name, parts in tensors.items()}
    files |= {folder / name: (HERE / name).read_bytes() for name in (SCHEMA, RUNNER)}
    write_files({**files, folder / "index.json": json.dumps(index, indent=1) + "\n"})
    return len(cases)


def evaluate(vector: VectorCase) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return a case's entry in the index and its tensors by name, computed by the op's definition in float64."""
    case = vector.case
    exact = case.exact(_any_kernel(vector.family))
    inputs = case.inputs(torch.device("cpu"))
    boundaries = case.cu_seqlens(inputs)
    if boundaries is not None:
        inputs["cu_seqlens"] = boundaries
    upstream = {}
    if case.grad:
        upstream = {
            name: case.cotangent(name, exact.outputs[name], torch.device("cpu")) for name in case.differentiated
        }
    expected = exact.outputs | {f"gradient.{name}": x for name, x in exact.gradients.items()}
    terms = exact.outputs_terms | {f"gradient.{name}": x for name, x in exact.gradients_terms.items()}
    parts = {f"inputs/{name}": _array(x) for name, x in inputs.items()}
    parts |= {f"cotangents/{name}": _array(x) for name, x in upstream.items()}
    parts |= {f"expected/{name}": _array(_finite_or_infinite(case, x)) for name, x in expected.items()}
    entry = {
        "id": vector.id,
        "family": vector.family,
        "property": vector.property,
        "reason": vector.reason,
        "attributes": _attributes(case),
        "inputs": list(inputs),
        "cotangents": list(upstream),
        "expected": {name: {"scale": _scale(terms[name])} for name in expected},
    }
    return entry, parts


def _any_kernel(family: str) -> Kernel:
    """Return a kernel for the scales of a family's gradients.

    The gradient of a log-decay may be computed as a difference of sums over all later tokens, as autograd does through
    a cumulative sum: its scale then has the terms that cancel.
    """
    references = [kernel for kernel in KERNELS.values() if kernel.reference]
    own = [kernel for kernel in references if kernel.op == family]
    kernels = own or [kernel for kernel in references if kernel.op == "scan"]  # only softmax looks at other fields
    return replace(min(kernels, key=lambda kernel: kernel.key), gradient_by_subtraction=True)


def _attributes(case: Any) -> Mapping[str, Any]:
    """Return the numbers and words of a call, other than its tensors."""
    attributes: dict[str, Any] = {}
    if "q" in case.axes and "H" in case.axes["q"]:
        attributes["scale"] = case.factor
    if hasattr(case, "steps"):
        attributes["steps"] = case.steps
    if getattr(case, "window", None) is not None:
        attributes["window"] = case.window
    if "softcap" in getattr(case, "scores", ()):
        attributes["softcap"] = case.softcap
    if getattr(case, "silu", False):
        attributes["activation"] = "silu"
    return attributes


def _scale(terms: Tensor) -> float:
    """Return the largest of the sums of absolute terms, with four digits; 1 for a tensor of zeros or of no elements."""
    largest = float(terms.abs().max()) if terms.numel() else 0.0
    return float(f"{largest:.4g}") or 1.0


def _finite_or_infinite(case: Any, x: Tensor) -> Tensor:
    """Return a result with -inf for the logarithm of zero, for which the definition has a large finite number."""
    return x.masked_fill(x < case.log_of_zero / 2, -torch.inf) if isinstance(case, LogScanCase) else x


def _array(x: Tensor) -> np.ndarray:
    """Return a tensor as numbers that numpy has: 16-bit floats become float32, which has the same numbers."""
    return x.detach().to(torch.float32 if x.dtype.itemsize == 2 else x.dtype).contiguous().numpy()
