"""Conformance vectors: they are correct, they detect wrong implementations, and their runner does not need seqmix."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from json_mutations import mutated_json

from seqmix.cli import app as cli
from seqmix.testing.vectors import runner
from seqmix.testing.vectors.cases import VARIANTS, vector_cases
from seqmix.testing.vectors.families import FAMILIES
from seqmix.testing.vectors.write import TOLERANCES, evaluate, write_vectors

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("scan", "short_convolution")
"""Families whose files are written quickly."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors") / "vectors"
    write_vectors(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def ops():
    return runner.load_implementation(str(ROOT / "examples" / "vectors" / "seqmix_ops.py"))


def grouped(parts):
    """The tensors of a case as the runner reads them."""
    arrays = {"inputs": {}, "cotangents": {}, "expected": {}}
    for name, x in parts.items():
        group, _, key = name.partition("/")
        arrays[group][key] = x
    return arrays


def failures(results):
    return Counter(result["property"] for result in results if result["status"] == runner.FAILED)


BACKENDS = (("reference", "float64"), ("native", "float32"))


def require_right(vector, ops, backends):
    entry, parts = evaluate(vector)
    for name, dtype in backends:
        function = getattr(getattr(ops, name), vector.family)
        results = list(runner.check_case(function, entry, grouped(parts), dtype, TOLERANCES[dtype]))
        assert results
        assert {status for _, status, _ in results} == {runner.PASSED}, (vector.id, name, results)


@pytest.mark.parametrize("family", FAMILIES)
def test_ops_match_the_vectors(family, ops):
    for vector in vector_cases((family,)):
        if vector.property != "long":
            require_right(vector, ops, BACKENDS)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ops_match_the_vectors_on_long_inputs_and_token_by_token(family, ops):
    for vector in vector_cases((family,)):
        backends = BACKENDS if vector.property == "long" else ()
        require_right(vector, ops, (*backends, ("recurrent", "float32")))


def test_every_case_has_a_unique_id_and_a_reason():
    cases = list(vector_cases())
    assert len({case.id for case in cases}) == len(cases) > 200
    assert {case.family for case in cases} == FAMILIES.keys() == VARIANTS.keys()
    assert all(case.reason.endswith(".") for case in cases)


def test_inputs_are_exact_in_bfloat16():
    for vector in vector_cases(("delta",)):
        if vector.property == "odd widths":
            _, parts = evaluate(vector)
            for name in ("q", "k", "v"):
                x = torch.from_numpy(parts[f"inputs/{name}"])
                assert torch.equal(x.bfloat16().float(), x)


def test_index_follows_its_schema(folder):
    jsonschema = pytest.importorskip("jsonschema")
    index, schema = (json.loads((folder / name).read_text()) for name in ("index.json", "index.schema.json"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(index, schema)
    tensors = {name for family in index["families"].values() for name in family["tensors"]}
    assert {name for case in index["cases"] for name in case["inputs"]} <= tensors
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(index | {"format": 2}, schema)


def test_writing_the_vectors_twice_gives_identical_files(folder, tmp_path):
    write_vectors(tmp_path / "again", SMALL)
    assert {file.name for file in folder.iterdir()} == {file.name for file in (tmp_path / "again").iterdir()}
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


IMPLEMENTATION = """
import sys
import numpy as np

def scan(inputs, attributes, cotangents):
    assert "torch" not in sys.modules and "seqmix" not in sys.modules
    x, decay, length = inputs["x"], np.exp(inputs["log_decay"]), inputs["x"].shape[1]
    if "cu_seqlens" in inputs:
        raise NotImplementedError("no packing")
    h, outputs = inputs.get("state", np.zeros_like(x[:, 0])), []
    for t in range(length):
        h = decay[:, t] * h + x[:, t]
        outputs.append(h)
    return {"output": np.stack(outputs, 1), "state": h}
"""


def run_runner(folder, text, *options, name=""):
    (folder.parent / "mine.py").write_text(text)
    command = [sys.executable, "-I", str(folder / "runner.py"), f"{folder.parent / 'mine.py'}{name}", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder.parent)


def test_runner_needs_neither_seqmix_nor_torch(folder):
    results = folder.parent / "results.json"
    ended = run_runner(folder, IMPLEMENTATION, "--json", str(results))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (row,) = (line for line in ended.stdout.splitlines() if line.startswith("log-decay -inf "))
    assert row.split()[-1] == "2"
    counts = Counter((result["property"], result["status"]) for result in json.loads(results.read_text()))
    assert counts["packed", runner.NOT_OFFERED] == 2
    assert counts["gradients", runner.PASSED] == 0 < counts["gradients", runner.NOT_OFFERED]
    assert not any(status == runner.FAILED for _, status in counts)


def test_runner_shows_the_failure_and_why_the_case_exists(folder):
    ended = run_runner(folder, IMPLEMENTATION.replace("decay[:, t] * h", "h"))
    assert ended.returncode == 1
    assert "FAILED scan/reset (log-decay -inf)" in ended.stdout
    assert "A log-decay of -inf forgets everything before the token" in ended.stdout
    assert "allowed 2.0e-05" in ended.stdout


def test_runner_reports_unusable_arguments(folder):
    assert "has a function for none of the families scan" in run_runner(folder, "def skan(): pass").stderr
    assert "expected families among scan" in run_runner(folder, IMPLEMENTATION, "--families", "skan").stderr
    missing = subprocess.run(
        [sys.executable, "-I", str(folder / "runner.py"), "nothere.py"], capture_output=True, text=True, check=False
    )
    assert "expected the implementation's file, FILE.py or FILE.py:NAME, got nothere.py" in missing.stderr


def returning(text):
    return f"import numpy as np\n\n\ndef scan(inputs, attributes, cotangents):\n    return {text}\n"


def test_implementation_that_exits_is_reported_as_failed(folder):
    ended = run_runner(folder, "import sys\n\n\ndef scan(*_):\n    sys.exit(0)\n")
    assert ended.returncode == 1
    assert "FAILED scan/" in ended.stdout
    assert "SystemExit: 0" in ended.stdout
    assert sentence(run_runner(folder, "raise SystemExit(0)")).endswith("cannot be imported: SystemExit: 0 (line 1)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inputs['x']", "expected a dict of results named output, state, gradient.x, gradient.log_decay, got ndarray"),
        ("None", "gradient.log_decay, got NoneType"),
        ("{'out': inputs['x']}", "gradient.log_decay, got out"),
        ("{'output': inputs['x'], 'gradients.x': inputs['x']}", "gradient.log_decay, got gradients.x"),
        ("{'output': inputs['x'], 'gradient.y': inputs['x']}", "gradient.log_decay, got gradient.y"),
        ("{'output': 'text'}", "output: expected an array, got str (ValueError: "),
        ("{'output': inputs['y']}", "  KeyError: 'y'"),
    ],
    ids=["array", "none", "out", "gradients", "gradient", "text", "error"],
)
def test_unreadable_results_are_failures(folder, text, message):
    ended = run_runner(folder, returning(text))
    assert ended.returncode == 1
    assert not ended.stderr
    assert message in ended.stdout


def test_gradients_of_absent_inputs_are_allowed(folder):
    more = '"state": h} | ({} if "state" in inputs else {"gradient.state": h}) | {'
    assert "FAILED" not in run_runner(folder, IMPLEMENTATION.replace('"state": h', more)).stdout


def test_runner_prints_why_nothing_passed(folder):
    ended = run_runner(folder, "def scan(*_):\n    raise NotImplementedError('no scans on Tuesdays')")
    assert ended.returncode == 1
    assert "not offered: no scans on Tuesdays (" in ended.stdout
    assert "nothing passed" in ended.stderr
    assert "gradient.state (3); no packing (3)\n" in run_runner(folder, IMPLEMENTATION).stdout


def sentence(ended):
    """The only line of a refusal."""
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    return line


def test_runner_suggests_objects_that_implement_families(folder):
    text = (
        IMPLEMENTATION.replace("def scan", "def _scan")
        + "import numpy\nclass Ops: scan = staticmethod(_scan)\nright = Ops()\nleft = Ops()"
    )
    remedy = f"; use {folder.parent / 'mine.py'}:NAME with one of right, left"
    assert sentence(run_runner(folder, text)).endswith(f"short_convolution{remedy}")
    assert sentence(run_runner(folder, text, name=":middle")).endswith(f"mine.py has no object middle{remedy}")
    assert run_runner(folder, text, name=":left").returncode == 0


def test_file_that_fails_to_import_reports_one_line(folder):
    assert sentence(run_runner(folder, "import nothere.at_all")).endswith("mine.py needs the package nothere")
    assert sentence(run_runner(folder, "x = 1\ny = z")).endswith(
        "mine.py cannot be imported: NameError: name 'z' is not defined (line 2)"
    )


@pytest.mark.parametrize("name", ["index.json", "scan.safetensors"])
def test_damaged_vectors_report_one_line(folder, tmp_path, name):
    for file in folder.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if file.name == name else content)
    message = sentence(run_runner(folder, IMPLEMENTATION, "--vectors", str(tmp_path)))
    assert message.startswith(str(tmp_path / name))
    assert message.endswith("damaged: write the vectors again")


@pytest.mark.parametrize("name", ["index.json", "scan.safetensors"])
def test_runner_does_not_wait_for_a_pipe_among_the_vectors(folder, tmp_path, name):
    for file in folder.iterdir():
        if file.name == name:
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert str(tmp_path) in sentence(run_runner(folder, IMPLEMENTATION, "--vectors", str(tmp_path)))


def test_unwritable_report_file_reports_one_line(folder):
    message = sentence(run_runner(folder, IMPLEMENTATION, "--json", "nowhere/a.json"))
    assert message == "nowhere/a.json cannot be written: No such file or directory"


def test_mutated_index_gives_results_or_a_one_line_error(folder, tmp_path, monkeypatch, capsys):
    """Mutations are seeded; output is printable, so it holds no control characters for a terminal."""
    index = json.loads((folder / "index.json").read_text())
    index["cases"] = index["cases"][:3]
    (tmp_path / "scan.safetensors").write_bytes((folder / "scan.safetensors").read_bytes())
    (tmp_path / "mine.py").write_text(IMPLEMENTATION.replace("assert", "assert True or"))
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.setattr("sys.argv", ["runner.py", str(tmp_path / "mine.py"), "--vectors", str(tmp_path)])
    refused = 0
    for name, content in mutated_json(index, seed=0, cases=200):
        (tmp_path / "index.json").write_bytes(content)
        with pytest.raises(SystemExit) as ended:
            runner.main()
        printed = capsys.readouterr().out
        assert printed.replace("\n", "").isprintable(), name
        if isinstance(ended.value.code, str):
            refused += 1
            assert ended.value.code.isprintable(), name
            assert len(ended.value.code) < 2000, name
    assert refused > 100


@pytest.mark.parametrize(
    "families", [["scan,short_convolution"], ["scan", "short_convolution,"]], ids=["commas", "both"]
)
def test_runner_accepts_families_separated_by_commas_or_spaces(folder, families):
    results = folder.parent / "results.json"
    run_runner(folder, IMPLEMENTATION, "--json", str(results), "--families", *families)
    assert {result["family"] for result in json.loads(results.read_text())} == set(SMALL)


def exact_scan(inputs, attributes, cotangents, *, start=None, decays=np.exp, across=False):
    x, decay = inputs["x"], decays(inputs["log_decay"])
    boundaries = inputs.get("cu_seqlens", np.array([0, x.shape[1]]))
    state = inputs.get("state", np.zeros((len(boundaries) - 1 if len(x) == 1 else len(x), *x.shape[2:]), x.dtype))
    output, final = np.zeros_like(x), state.copy()
    for n, (begin, end) in enumerate(pairwise(boundaries)):
        rows = slice(n, n + 1) if "cu_seqlens" in inputs else slice(None)
        h = output[:, begin - 1] if across and begin else state[rows]
        for t in range(begin, end):
            h = (1 if start == "not decayed" and t == begin else decay[:, t]) * h + x[:, t]
            output[:, t] = h
        final[rows] = h
    return {"output": output, "state": np.zeros_like(final) if start == "state lost" else final}


def by_differences(inputs, attributes, cotangents):
    """A scan by exp(cumsum), whose differences lose digits and turn inf - inf into NaN."""
    if "cu_seqlens" in inputs or "state" in inputs:
        raise NotImplementedError
    total = np.cumsum(inputs["log_decay"], axis=1)
    weights = np.tril(np.exp(np.moveaxis(total[:, :, None] - total[:, None], (1, 2), (-2, -1))))
    return {"output": np.einsum("bhvts,bshv->bthv", weights, inputs["x"])}


@pytest.mark.parametrize(
    ("wrong", "properties"),
    [
        ({}, set()),
        ({"start": "not decayed"}, {"state in", "log-decay -inf", "packed", "empty documents", "state out"}),
        ({"start": "state lost"}, {"state out"}),
        ({"across": True}, {"packed", "empty documents", "state out"}),
        ({"decays": lambda a: np.exp(a).astype(np.float16)}, {"weak decay", "long", "chunk + 1"}),
    ],
    ids=["right", "start", "final", "documents", "16 bits"],
)
def test_wrong_scan_fails_the_expected_properties(folder, wrong, properties):
    implementation = SimpleNamespace(scan=lambda *call: exact_scan(*call, **wrong))
    found = failures(runner.run(implementation, folder, families=["scan"])).keys()
    assert found >= properties
    assert properties or not found


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scan_by_cumulative_differences_fails_at_resets(folder):
    cases = [pair for pair in runner.load_vectors(folder, ["scan"]) if pair[0]["property"] != "long"]
    results = [
        (which, status)
        for case, arrays in cases
        for which, status, _ in runner.check_case(by_differences, case, arrays, "float32", 2e-5)
    ]
    assert ("log-decay -inf", runner.FAILED) in results
    assert ("batch", runner.PASSED) in results


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["seqmix", "vectors", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_command_rejects_bad_arguments_before_computing(tmp_path, monkeypatch, capsys):
    assert run_command(monkeypatch, tmp_path / "v", "--families", "scan,lag_scan") == 2
    error = capsys.readouterr().err
    assert "there is no family 'lag_scan'; did you mean \"log_scan\"?" in error
    assert all(name in error for name in FAMILIES)
    assert run_command(monkeypatch, tmp_path / "v", "--families", ",") == 2
    assert "there is no family ','" in capsys.readouterr().err
    assert not (tmp_path / "v").exists()
    (tmp_path / "thesis.tex").write_text("")
    assert run_command(monkeypatch, tmp_path, "--families", "scan") == 3
    assert "expected a new or empty folder" in capsys.readouterr().err


def test_command_writes_the_selected_families(tmp_path, monkeypatch, capsys):
    assert run_command(monkeypatch, tmp_path / "v", "--families", "short_convolution,") == 0
    assert "11 cases" in capsys.readouterr().out
    assert {file.name for file in (tmp_path / "v").iterdir()} == {
        "index.json",
        "index.schema.json",
        "runner.py",
        "short_convolution.safetensors",
    }


def test_documented_implementation_passes(folder):
    page = (ROOT / "docs" / "reference" / "vectors.md").read_text()
    (text,) = re.findall(r"```python\n# my_scan.py\n(.*?)```", page, re.DOTALL)
    ended = run_runner(folder, text)
    assert ended.returncode == 0, ended.stdout + ended.stderr
