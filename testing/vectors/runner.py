"""Test an implementation of a recurrence on the conformance vectors beside this file: `python runner.py FILE.py`.

FILE.py (or FILE.py:NAME, an object in it) has one function for each family that it offers, by the family's name:

    def decay(inputs, attributes, cotangents):
        return {"output": ..., "state": ..., "gradient.q": ...}

`inputs` are arrays by name, `attributes` numbers and words, as index.json describes them; an optional input that is
absent is not in `inputs`. `cotangents` are the gradients of the results, from which the gradients of the inputs follow;
empty if none are wanted. A function leaves out of its result what it cannot compute; for a call that it does not offer
at all, it raises NotImplementedError with the reason. Anything else that it raises is a failure, sys.exit() too, and so
is a result that is no dict or has a name that the family does not have.

Needs numpy and safetensors. You may copy this file and change it.
"""

import argparse
import importlib.util
import json
import re
import sys
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

FORMAT = 1
PASSED, FAILED, NOT_OFFERED = "passed", "failed", "not offered"
PARTS = ("state out", "gradients", "gradients through states")
"""Properties of single results; the other properties are those of cases, which their output counts for."""
REASONS = 5
"""Number of reasons for what is not offered that are printed."""
HERE = Path(__file__).resolve().parent
ERRORS = (Exception, SystemExit)
"""Whatever an implementation may raise; KeyboardInterrupt is the user's own."""


def is_text(value):
    """Return True for a text."""
    return isinstance(value, str)


def is_file_name(value):
    """Return True for the name of a family's file."""
    return isinstance(value, str) and re.fullmatch(r"[a-z_]+\.safetensors", value) is not None


def is_positive(value):
    """Return True for a positive number that float64 has."""
    return type(value) in (int, float) and 0 < value < 1e300


def is_attribute(value):
    """Return True for a number or a word."""
    return isinstance(value, (int, float, str))


INDEX = {
    "tolerances": {"float64": is_positive, "float32": is_positive},
    "families": {"*": {"tensors": {"*": is_text}, "file": is_file_name}},
    "cases": [
        {
            **dict.fromkeys(("id", "family", "property", "reason"), is_text),
            "attributes": {"*": is_attribute},
            "inputs": [is_text],
            "cotangents": [is_text],
            "expected": {"*": {"scale": is_positive}},
        }
    ],
}
"""The parts of index.json that are read: a list is of any length, and "*" stands for any names."""


def find_fault(value, expected, place):
    """Return the place of the first part of a value that is not as expected, or an empty text."""
    if callable(expected):
        return "" if expected(value) else place
    if type(value) is not type(expected):
        return place
    if isinstance(expected, list):
        parts = [(number, part, expected[0]) for number, part in enumerate(value)]
    elif "*" in expected:
        parts = [(name, part, expected["*"]) for name, part in value.items()]
    else:
        parts = [(name, value.get(name), each) for name, each in expected.items()]
    faults = (find_fault(part, each, f"{place}.{name}") for name, part, each in parts)
    return next(filter(None, faults), "")


def stop(sentence) -> NoReturn:
    """End the program with a sentence on standard error."""
    sys.exit(printable(sentence))


def printable(text):
    """Return a text in one line, with control characters escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def load_index(folder):
    """Return the index of a folder of vectors."""
    path = folder / "index.json"
    if not path.is_file():  # a pipe would never end
        stop(f"expected a folder with index.json, got {folder}: use --vectors")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["format"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        stop(f"{path} is damaged: write the vectors again")
    if version != FORMAT:
        stop(f"this runner reads format {FORMAT}, got format {version!r:.40}: use the runner beside the vectors")
    if fault := find_fault(index, INDEX, "index"):
        stop(f"{path} is damaged at {fault:.80}: write the vectors again")
    return index


def load_vectors(folder, families=None):
    """Yield the cases of a folder of vectors: the case's entry in the index, and its arrays by group and name."""
    index = load_index(folder)
    if unknown := set(families or ()) - set(index["families"]):
        stop(f"expected families among {', '.join(index['families'])}, got {', '.join(sorted(unknown))}")
    for name in families or index["families"]:
        path = folder / index["families"][name]["file"]
        try:
            if not path.is_file():
                raise FileNotFoundError
            tensors = load_file(path)
            cases = [
                (
                    case,
                    {
                        group: {key: tensors[f"{case['id']}/{group}/{key}"] for key in case[group]}
                        for group in ("inputs", "cotangents", "expected")
                    },
                )
                for case in index["cases"]
                if case["family"] == name
            ]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):  # the last three: a dtype numpy lacks
            stop(f"{path} is missing or damaged: write the vectors again")
        yield from cases


def describe(error):
    """Return an exception in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no message')}"


def cast(arrays, dtype):
    """Return arrays by name, with the floating-point ones in this dtype."""
    return {name: x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x for name, x in arrays.items()}


def compare(actual, expected, scale, tolerance):
    """Return why a result is wrong; an empty text if it is right."""
    try:
        actual = np.asarray(actual, dtype=np.float64)
    except ERRORS as error:  # whatever stands in the place of an array
        return f"expected an array, got {type(actual).__name__} ({describe(error)})"
    if actual.shape != expected.shape:
        return f"expected shape {list(expected.shape)}, got {list(actual.shape)}"
    with np.errstate(invalid="ignore"):  # inf - inf
        error = np.where(actual == expected, 0.0, np.abs(actual - expected))
    error = np.where(np.isnan(error), np.inf, error)
    if error.size == 0 or error.max() <= tolerance * scale:
        return ""
    worst = np.unravel_index(error.argmax(), error.shape)
    place = ", ".join(map(str, worst))
    return (
        f"expected {expected[worst]:.7g} at [{place}], got {actual[worst]:.7g}; "
        f"off by {error.max() / scale:.1e} of the scale, allowed {tolerance:.1e}"
    )


def property_of(case, name):
    """Return the property that one result of a case counts for."""
    if name == "output":
        return case["property"]
    if not name.startswith("gradient."):
        return PARTS[0]
    return PARTS[1] if len(case["cotangents"]) == 1 else PARTS[2]


def check_names(results, case, tensors=()):
    """Return why the results of a case cannot be read: they are no dict by name, or have names that the family lacks.

    The gradient of any of the family's tensors is allowed, also of one that is absent in this case.
    """
    names = ", ".join(case["expected"])
    if not isinstance(results, Mapping):
        return f"expected a dict of results named {names}, got {type(results).__name__}"
    known = {"output", "state", *case["expected"], *(f"gradient.{name}" for name in (*case["inputs"], *tensors))}
    unknown = [str(name) for name in results if name not in known]
    return f"expected results named {names}, got {', '.join(unknown)}" if unknown else ""


def check_case(function, case, arrays, dtype, tolerance, tensors=()):
    """Run one case of a family with these tensors; yield (property, status, detail) for each of its results."""
    if function is None:
        yield case["property"], NOT_OFFERED, "no such family"
        return
    inputs, cotangents = cast(arrays["inputs"], dtype), cast(arrays["cotangents"], dtype)
    try:
        results = function(inputs, dict(case["attributes"]), cotangents)
    except NotImplementedError as reason:
        yield case["property"], NOT_OFFERED, str(reason) or "NotImplementedError without a reason"
        return
    except ERRORS as error:  # a failure of the case
        yield case["property"], FAILED, describe(error)
        return
    if reason := check_names(results, case, tensors):
        yield case["property"], FAILED, reason
        return
    parts = {}
    for name, expected in arrays["expected"].items():
        right, wrong, missing = parts.setdefault(property_of(case, name), ([], [], []))
        if name not in results:
            missing.append(name)
        elif reason := compare(results[name], expected, case["expected"][name]["scale"], tolerance):
            wrong.append(f"{name}: {reason}")
        else:
            right.append(name)
    for which, (right, wrong, missing) in parts.items():
        if wrong:
            yield which, FAILED, "; ".join(wrong)
        else:  # what is computed is right
            yield which, PASSED if right else NOT_OFFERED, f"without {', '.join(missing)}" if missing else ""


def run(implementation, folder=HERE, dtype="float32", families=None):
    """Test an implementation, an object with a function per family; return a list of one dict per result.

    Its texts are in one line each, safe to print.
    """
    index = load_index(folder)
    results = [
        {"id": case["id"], "family": case["family"], "property": which, "status": status, "detail": detail}
        | {"reason": case["reason"]}
        for case, arrays in load_vectors(folder, families)
        for which, status, detail in check_case(
            getattr(implementation, case["family"], None),
            case,
            arrays,
            dtype,
            index["tolerances"][dtype],
            index["families"][case["family"]]["tensors"],
        )
    ]
    return [{field: printable(text) for field, text in result.items()} for result in results]


def families_of(implementation, families):
    """Return those of the families that an implementation has a function for."""
    return [name for name in families if callable(getattr(implementation, name, None))]


def objects_of(module, families):
    """Return the names of a module's objects that have functions for families."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, (ModuleType, type)) and families_of(value, families)
    ]


def load_implementation(name, families=()):
    """Return the module of a file, or an object in it, which has some of the families: FILE.py or FILE.py:NAME."""
    path, _, attribute = name.partition(":")
    if not Path(path).is_file():
        stop(f"expected the implementation's file, FILE.py or FILE.py:NAME, got {name}")
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        stop(f"expected a file of Python, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        stop(f"{path} needs the package {error.name}")
    except ERRORS as error:
        lines = [f" (line {x.lineno})" for x in traceback.extract_tb(error.__traceback__) if x.filename == spec.origin]
        stop(f"{path} cannot be imported: {describe(error)}{''.join(lines[-1:])}")
    choices = ", ".join(objects_of(module, families))
    remedy = f"; use {path}:NAME with one of {choices}" if choices else ""
    if attribute and not hasattr(module, attribute):
        stop(f"{path} has no object {attribute}{remedy}")
    implementation = getattr(module, attribute) if attribute else module
    if families and not families_of(implementation, families):
        stop(f"{name} has a function for none of the families {', '.join(families)}{remedy}")
    return implementation


def print_results(results):
    """Print a table of the properties, why results are not offered, and each failure with the reason for its case."""
    counts = Counter((result["property"], result["status"]) for result in results)
    statuses = (PASSED, FAILED, NOT_OFFERED)
    properties = [*dict.fromkeys(result["property"] for result in results)]
    properties.sort(key=lambda name: name in PARTS)
    width = max(map(len, properties), default=0)
    print(f"{'':{width}}  " + "  ".join(f"{status:>11}" for status in statuses))
    for name in properties:
        print(f"{name:{width}}  " + "  ".join(f"{counts[name, status] or '':>11}" for status in statuses))
    reasons = Counter(result["detail"] for result in results if result["status"] == NOT_OFFERED)
    if reasons:
        commonest = [f"{reason} ({number})" for reason, number in reasons.most_common(REASONS)]
        rest = [f"{len(reasons) - REASONS} other reasons"] if len(reasons) > REASONS else []
        print(f"\nnot offered: {'; '.join(commonest + rest)}")
    for result in results:
        if result["status"] == FAILED:
            print(f"\nFAILED {result['id']} ({result['property']})\n  {result['detail']}\n  {result['reason']}")


def main():
    """Run the command line; the exit code is 1 if a case failed, or if nothing passed."""
    parser = argparse.ArgumentParser(description="Test an implementation on the conformance vectors.")
    parser.add_argument("implementation", help="FILE.py, or FILE.py:NAME")
    parser.add_argument("--vectors", type=Path, default=HERE, help="folder of the vectors (default: this file's)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument(
        "--families", nargs="+", help="families to test, separated by commas or spaces (default: all that FILE.py has)"
    )
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    known = load_index(options.vectors)["families"]
    implementation = load_implementation(options.implementation, known)
    families = [name for words in options.families or () for name in words.split(",") if name]
    if options.families and not families:
        stop(f"expected families among {', '.join(known)}, got {' '.join(options.families)}")
    families = list(dict.fromkeys(families)) or families_of(implementation, known)
    results = run(implementation, options.vectors, options.dtype, families)
    print_results(results)
    if options.json:
        try:
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            stop(f"{options.json} cannot be written: {error.strerror}")
    statuses = Counter(result["status"] for result in results)
    if not statuses[FAILED] and not statuses[PASSED]:
        sys.exit("nothing passed: no result was offered")
    sys.exit(1 if statuses[FAILED] else 0)


if __name__ == "__main__":
    main()
