"""The pytest options that seqmix adds to a project."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from seqmix.testing.engine import parametrize

pytest_plugins = ["pytester"]
PLUGIN = "seqmix.cli.pytest_plugin"
TESTS = """
from seqmix.mixers.retention import RetentionConfig
from seqmix.testing import parametrize_checks


@parametrize_checks([RetentionConfig(n_heads=2)], examples=3)
def test_conformance(check):
    check(on_outcome=lambda outcome: print(outcome.check.name, "examples:", outcome.examples))


def test_other():
    pass
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Run pytest in another project; the plug-in is named, for it may not be installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(parametrize, "COMMAND_LINE", parametrize.CommandLine())
    pytester.makepyfile(TESTS)
    return lambda *options: pytester.runpytest_inprocess("-p", PLUGIN, "-rP", *options)


def test_options_select_checks_and_set_the_number_of_examples(run):
    names = ("rows_are_independent", "dtypes_are_kept")
    done = run("--seqmix-examples", "40", *(word for name in names for word in ("--seqmix-check", name)))
    outcomes = done.parseoutcomes()
    assert outcomes["passed"] == 3
    assert outcomes["deselected"] > 20
    examples = dict(re.findall(r"^(\w+) examples: (\d+)$", done.stdout.str(), re.MULTILINE))
    assert examples.keys() == set(names)
    assert int(examples["rows_are_independent"]) > 3


def test_stress_checks_run_when_enabled_or_named(run):
    default, stress = (run("--collect-only", "-q", *options).stdout.str() for options in ((), ("--seqmix-stress",)))
    assert "surroundings_change_nothing" not in default
    assert "surroundings_change_nothing" in stress
    assert run("--seqmix-check", "every_parameter_learns").parseoutcomes()["passed"] == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--seqmix-check", "row_are_independent"), "'row_are_independent'.*\"rows_are_independent\""),
        (("--seqmix-examples", "0"), "--seqmix-examples .*>= 1.* 0"),
    ],
)
def test_wrong_option_reports_a_usage_error_that_names_it(run, options, named):
    done = run(*options)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert re.search(f"^ERROR: .*{named}", done.stderr.str(), re.MULTILINE)


@pytest.mark.slow
def test_wrong_option_reports_a_usage_error_under_xdist(run):
    done = run("-p", "xdist", "-n", "1", "--seqmix-check", "row_are_independent")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert re.search("^ERROR: .*'row_are_independent'.*\"rows_are_independent\"", done.stderr.str(), re.MULTILINE)
    assert "INTERNALERROR" not in done.stdout.str() + done.stderr.str()


def test_pytest_plugin_is_declared_and_imports_no_heavy_library():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"seqmix": PLUGIN}
    code = f"import sys, {PLUGIN}; print([name for name in ('torch', 'hypothesis', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
