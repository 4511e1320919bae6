"""Commands driven by other programs: an exit status per cause, results as JSON, and no prompts."""

import json
import re
from pathlib import Path

import pytest
from conftest import SMALL

from seqmix import __version__
from seqmix.cli import app as cli
from seqmix.cli.json_output import _finite

TEXT = "data.paths=[text.txt]"


@pytest.mark.parametrize(
    ("status", "arguments", "sentence"),
    [
        (2, ("train", "retnet-tniy"), 'did you mean "retnet-tiny"?'),
        (2, ("train", "retnet-tiny", "model.n_layers=0"), "model.n_layers"),
        (2, ("train", "retnet-tiny", "--budget", "soon"), "expected a duration such as 90s, 30m or 1h30m"),
        (
            3,
            ("train", "retnet-tiny", *SMALL, "data.paths=[texts.txt]"),
            "data.paths: the corpus texts.txt does not exist",
        ),
        (3, ("train", "--resume", "nothere"), "nothere is not a run directory"),
        (3, ("generate", "nothere"), "nothere is not a run directory: it does not exist"),
        (3, ("evaluate", "nothere"), "nothere is not a run directory"),
        (3, ("average", "nothere", "new"), "nothere is not a run directory"),
        (3, ("plot", "nothere"), "nothere"),
        (5, ("train", "retnet-tiny", *SMALL, TEXT, "model.d_model=1048576"), "out of memory"),
    ],
)
def test_exit_status_depends_on_the_cause(refused, status, arguments, sentence):
    assert sentence in refused(*arguments, status=status)


def test_divergence_has_its_own_exit_status(seqmix):
    done = seqmix("train", "retnet-tiny", *SMALL, TEXT, "training.learning_rate=1.0e+30", "training.warmup_steps=0")
    assert (done.status, done.err.count("\n")) == (4, 1)
    assert "try a lower training.learning_rate" in done.err


def result_of(done) -> dict:
    """The JSON that is all of standard output."""
    return json.loads(done.out)


def test_every_command_has_a_json_option():
    for name in cli.COMMANDS:
        (option,) = (each for each in cli.import_command(name).params if "--json" in each.opts)
        assert (option.metavar, option.required) == ("FILE", False), name


def test_json_result_goes_to_stdout_and_the_rest_to_stderr(seqmix):
    done = seqmix("train", "retnet-tiny", *SMALL, TEXT, "--out", "run", "--json", "-")
    result = result_of(done)
    assert (done.status, result["command"], result["exit_status"]) == (0, "train", 0)
    assert result["seqmix"] == __version__
    assert (result["run"], result["state"], result["step"]) == ("run", "finished", 6)
    assert result["checkpoint"] == "run/checkpoints/step-000006"
    assert f"validation {result['validation_loss']:.4f}" in done.err
    done = seqmix("generate", "run", "--prompt", "the ", "--max-new-tokens", "9", "--json", "-")
    (text,) = result_of(done)["texts"]
    assert (text["prompt"], bool(text["continuation"])) == ("the ", True)
    assert done.err.startswith("the " + text["continuation"])
    assert seqmix("average", "run", "mean", "--json", "mean.json").status == 0
    assert json.loads(Path("mean.json").read_text())["steps"] == [4, 6]


@pytest.mark.parametrize("arguments", [("mixers",), ("show", "retnet-tiny", "--parameters"), ("compare", "--list")])
def test_short_commands_print_json_results(seqmix, arguments):
    done = seqmix(*arguments, "--json", "-")
    result = result_of(done)
    assert (done.status, result["command"]) == (0, arguments[0])
    assert next(value for name, value in result.items() if name not in ("seqmix", "command", "exit_status"))


def test_errors_are_also_reported_as_json(seqmix):
    done = seqmix("evaluate", "nothere", "--json", "-")
    result = result_of(done)
    assert (done.status, result["exit_status"]) == (3, 3)
    assert done.err == f"error: {result['error']}\n"
    (problem,) = result["problems"]
    assert problem == {
        "sentence": result["error"], "file": None, "line": None, "key": None, "did_you_mean": None,
    }  # fmt: skip
    assert seqmix("evaluate", "nothere", "--json", "file.json").status == 3
    assert not Path("file.json").exists()


@pytest.mark.parametrize(
    ("text", "override", "parts"),
    [
        (
            "extends: retnet-tiny\ntraining:\n  optimizer: {kind: adamz}\n",
            [],
            ("a.yaml", 3, "training.optimizer", "adamw"),
        ),
        ("extends: retnet-tiny\nmodl: {}\n", [], ("a.yaml", 2, "modl", "model")),
        ("extends: retnet-tiny\ntraining:\n\tsteps: 1\n", [], ("a.yaml", 3, None, None)),
        ("extends: retnet-tiny\n", ["model.pattern=[x]"], ("command line", None, "model.pattern", None)),
        ("extends: retnet-tiny\ndata:\n  paths: [no.txt]\n", SMALL, ("a.yaml", 3, "data.paths", None)),
    ],
)
def test_json_error_has_fields_for_location_and_suggestion(seqmix, text, override, parts):
    Path("a.yaml").write_text(text)
    result = result_of(seqmix("train", "a.yaml", *override, "--json", "-"))
    problem = result["problems"][0]
    assert (problem["file"], problem["line"], problem["key"], problem["did_you_mean"]) == parts
    assert result["error"].endswith(problem["sentence"])
    assert "a.yaml:" not in problem["sentence"]


def test_onnx_file_name_requires_the_onnx_format(seqmix, refused):
    assert "run.onnx is the name of an ONNX file: add --to onnx" in refused("export", "run", "run.onnx")
    assert "--to onnx needs an output: --out FILE.onnx" in refused("export", "run", "--to", "onnx")
    Path("run.onnx").touch()
    message = refused("inspect", "run.onnx", "--text", "a", status=3)
    assert "run.onnx is an ONNX file, which only `seqmix generate` runs" in message


def test_non_finite_numbers_become_null():
    assert _finite({"a": [float("nan"), 1.0], "b": float("-inf")}) == {"a": [None, 1.0], "b": None}


def test_json_option_rejects_an_unusable_file(refused):
    assert "write --json -" in refused("show", "retnet-tiny", "--json")
    assert "there is no folder" in refused("show", "retnet-tiny", "--json", "no/such.json", status=3)
    same = refused("average", "nothere", "new", "--json", "new")
    assert same == "OUT and --json are both new: give them different names"


@pytest.mark.parametrize("arguments", [("mixers",), ("show", "retnet-tiny"), ("average", "run", "mean")])
def test_json_result_has_the_fields_of_its_schema(seqmix, arguments):
    seqmix("train", "retnet-tiny", *SMALL, TEXT, "--out", "run")
    result = result_of(seqmix(*arguments, "--json", "-"))
    schema = result_of(seqmix("schema", "--result", arguments[0], "--json", "-"))["schema"]
    objects = [schema["$defs"][part["$ref"].rpartition("/")[2]]["properties"] for part in schema["anyOf"]]
    assert result.keys() in [{"seqmix", "command", "exit_status", *fields} for fields in objects]


def test_schema_suggests_only_command_names(refused):
    assert 'did you mean "compare"?' in refused("schema", "--result", "consol-compare")
    for name in ("consol", "option", "study_progres"):
        assert not set(re.findall(r"[a-z_-]+", refused("schema", "--result", name).split("did you")[-1])) & {
            "console", "options", "study-progress",
        }  # fmt: skip


def test_status_reports_the_state_of_a_run(seqmix, refused):
    seqmix("train", "retnet-tiny", *SMALL, TEXT, "--out", "run", "--budget", "0.001")
    done = seqmix("status", "run", "--json", "-")
    status = result_of(done)["folders"]["run"]
    assert (status["state"], status["step"], status["steps"]) == ("stopped", 1, 6)
    assert "stopped" in done.err
    assert result_of(seqmix("status", ".", "--json", "-"))["folders"] == {"run": status}
    assert "no status.json" in refused("status", "run/checkpoints", status=3)
