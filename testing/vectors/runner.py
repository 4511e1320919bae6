"""Test an implementation of a recurrence on the conformance vectors beside this file: `python runner.py FILE.py`.

FILE.py (or FILE.py:NAME, an object in it) has one function for each family that it offers, by the family's name:

    def decay(inputs, attributes, cotangents):
        return {"output": ..., "state": ..., "gradient.q": ...}

`inputs` are arrays by name, `attributes` numbers and words, as index.json describes them; an optional input that is
absent is not in `inputs`. `cotangents` are the gradients of the results, from which the gradients of the inputs follow;
empty if none are wanted. A function leaves out of its result what it cannot compute; for a call that it does not offer
at all, it raises NotImplementedError with the reason. Anything else that it raises is a failure.

Needs numpy and safetensors. You may copy this file and change it.
"""

import argparse
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from safetensors import safe_open

FORMAT = 1
PASSED, FAILED, NOT_OFFERED = "passed", "failed", "not offered"
PARTS = ("state out", "gradients", "gradients through states")
"""Properties of single results; the other properties are those of cases, which their output counts for."""
HERE = Path(__file__).resolve().parent


def load_vectors(folder, families=None):
    """Yield the cases of a folder of vectors: the case's entry in the index, and its arrays by group and name."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    if index["format"] != FORMAT:
        sys.exit(f"this runner reads format {FORMAT}, got format {index['format']}: use the runner beside the vectors")
    if unknown := set(families or ()) - set(index["families"]):
        sys.exit(f"expected families among {', '.join(index['families'])}, got {', '.join(sorted(unknown))}")
    for name in families or index["families"]:
        with safe_open(folder / index["families"][name]["file"], framework="np") as file:
            for case in index["cases"]:
                if case["family"] == name:
                    groups = {group: list(case[group]) for group in ("inputs", "cotangents", "expected")}
                    yield (
                        case,
                        {
                            group: {key: file.get_tensor(f"{case['id']}/{group}/{key}") for key in keys}
                            for group, keys in groups.items()
                        },
                    )


def cast(arrays, dtype):
    """Return arrays by name, with the floating-point ones in this dtype."""
    return {name: x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x for name, x in arrays.items()}


def compare(actual, expected, scale, tolerance):
    """Return why a result is wrong; an empty text if it is right."""
    actual = np.asarray(actual, dtype=np.float64)
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


def check_case(function, case, arrays, dtype, tolerance):
    """Run one case; yield (property, status, detail) for each of its results."""
    if function is None:
        yield case["property"], NOT_OFFERED, "no such family"
        return
    inputs, cotangents = cast(arrays["inputs"], dtype), cast(arrays["cotangents"], dtype)
    try:
        results = function(inputs, dict(case["attributes"]), cotangents)
    except NotImplementedError as reason:
        yield case["property"], NOT_OFFERED, str(reason)
        return
    except Exception as error:  # whatever an implementation raises is a failure of the case
        yield case["property"], FAILED, f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
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
    """Test an implementation, an object with a function per family; return a list of one dict per result."""
    tolerance = json.loads((folder / "index.json").read_text(encoding="utf-8"))["tolerances"][dtype]
    return [
        {"id": case["id"], "family": case["family"], "property": which, "status": status, "detail": detail}
        | {"reason": case["reason"]}
        for case, arrays in load_vectors(folder, families)
        for which, status, detail in check_case(
            getattr(implementation, case["family"], None), case, arrays, dtype, tolerance
        )
    ]


def load_implementation(name):
    """Return the module of a file, or an object in it: FILE.py or FILE.py:NAME."""
    path, _, attribute = name.partition(":")
    if not Path(path).is_file():
        sys.exit(f"expected the implementation's file, FILE.py or FILE.py:NAME, got {name}")
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        sys.exit(f"expected a file of Python, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    if attribute and not hasattr(module, attribute):
        sys.exit(f"{path} has no {attribute}")
    return getattr(module, attribute) if attribute else module


def print_results(results):
    """Print a table of the properties, and a line for each failure with the reason why its case exists."""
    counts = Counter((result["property"], result["status"]) for result in results)
    statuses = (PASSED, FAILED, NOT_OFFERED)
    properties = [*dict.fromkeys(result["property"] for result in results)]
    properties.sort(key=lambda name: name in PARTS)
    width = max(map(len, properties), default=0)
    print(f"{'':{width}}  " + "  ".join(f"{status:>11}" for status in statuses))
    for name in properties:
        print(f"{name:{width}}  " + "  ".join(f"{counts[name, status] or '':>11}" for status in statuses))
    for result in results:
        if result["status"] == FAILED:
            print(f"\nFAILED {result['id']} ({result['property']})\n  {result['detail']}\n  {result['reason']}")


def main():
    """Run the command line; the exit code is 1 if a case failed, or if nothing passed."""
    parser = argparse.ArgumentParser(description="Test an implementation on the conformance vectors.")
    parser.add_argument("implementation", help="FILE.py, or FILE.py:NAME")
    parser.add_argument("--vectors", type=Path, default=HERE, help="folder of the vectors (default: this file's)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--families", nargs="+", help="families to test (default: all that the file has functions for)")
    parser.add_argument("--json", type=Path, help="also write all results to this file")
    options = parser.parse_args()
    if not (options.vectors / "index.json").is_file():
        sys.exit(f"expected a folder with index.json, got {options.vectors}: use --vectors")
    implementation = load_implementation(options.implementation)
    known = json.loads((options.vectors / "index.json").read_text(encoding="utf-8"))["families"]
    families = options.families or [name for name in known if hasattr(implementation, name)]
    if not families:
        sys.exit(f"{options.implementation} has a function for none of the families {', '.join(known)}")
    results = run(implementation, options.vectors, options.dtype, families)
    print_results(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    statuses = Counter(result["status"] for result in results)
    sys.exit(1 if statuses[FAILED] or not statuses[PASSED] else 0)


if __name__ == "__main__":
    main()
