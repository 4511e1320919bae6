"""The examples: the plug-in (without installing it), the report on the page about adding a mixer, the notebook and the
agent loop.
"""

import importlib
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from seqmix.testing import check_mixer

SOURCE = Path(__file__).parents[2] / "examples" / "plugin" / "seqmix_mingru" / "__init__.py"
MODULE = "mingru_of_the_test"

SLIPS = {
    "the state is dropped": ("return new + keep * before[:, None]", "return new", "paradigms_agree"),
    "the scan is one token off": ("F.pad(new, (0, 0, reach, -reach))", "F.pad(new, (0, 0, 1, -1))", "paradigms_agree"),
    "a document reads the one before": ("run(keep.masked_fill(first, 0)", "run(keep", "documents_are_sequences"),
    "the state keeps all tokens alive": ("hidden[:, -1].clone()", "hidden[:, -1]", "a_state_has_the_declared_size"),
}
"""What is wrong: the line as it is, as it becomes, and the check that finds it."""


@pytest.fixture
def mingru(tmp_path, monkeypatch):
    """Its configuration, from its source with a slip in one line."""
    monkeypatch.syspath_prepend(tmp_path)

    def load(right: str = "", wrong: str = ""):
        source = SOURCE.read_text()
        assert not right or source.count(right) == 1
        (tmp_path / f"{MODULE}.py").write_text(source.replace(right, wrong) if right else source)
        return importlib.import_module(MODULE).MinGRUConfig()

    yield load
    sys.modules.pop(MODULE, None)


def test_example_mixer_passes_the_contract(mingru):
    assert len(SOURCE.read_text().splitlines()) < 120
    report = check_mixer(mingru(), examples=20, compiles=False)
    assert report.passed, report.failures[0].reason


@pytest.mark.parametrize("slip", SLIPS)
def test_bug_in_one_line_is_found_with_at_most_three_tokens(mingru, slip):
    *lines, name = SLIPS[slip]
    config = mingru(*lines)
    (failure,) = check_mixer(config, checks=[name]).failures
    assert failure.case.length <= 3


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "own-mixer.md"


def test_report_on_the_page_matches_the_example_output(tmp_path, monkeypatch, capsys):
    text = PAGE.read_text()
    (source,) = re.findall(r"^```python\n(# convolution.py\n.*?)^```$", text, re.M | re.S)
    ((example, shown),) = re.findall(
        r"^```python\n([^`]*print\(failure.reason\)[^`]*)```\n\n[^`]*```text\n(.*?)```$", text, re.M | re.S
    )
    (tmp_path / "convolution.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        # the page's blocks share one namespace, and this one is said to be a file
        exec("from convolution import *\n" + example, {"__name__": "report"})
    finally:
        sys.modules.pop("convolution", None)
    number = r"-?\d+\.\d+"
    printed, pattern = capsys.readouterr().out, re.escape(shown.strip()).replace(r"\.\.\.", ".*")
    assert re.fullmatch(re.sub(r"\\?-?\d+\\\.\d+", lambda _: number, pattern), printed.strip())
    # the last digits depend on the machine
    assert [float(n) for n in re.findall(number, printed)] == pytest.approx(
        [float(n) for n in re.findall(number, shown)], rel=1e-3
    )


NOTEBOOK = Path(__file__).parents[2] / "examples" / "tour.ipynb"


@pytest.mark.slow
def test_notebook_cells_run(tmp_path, monkeypatch):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    namespace = {"__name__": "documentation"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)


LOOP = Path(__file__).parents[2] / "examples" / "agent_loop.py"


@pytest.mark.slow
def test_agent_loop_runs_unattended_and_records_decisions(tmp_path):
    (tmp_path / "text.txt").write_text("a text that is learned, line after line\n" * 2000)
    command = [sys.executable, LOOP, "--minutes", "1", "--steps", "3", "--seeds", "2", "--text", "text.txt"]
    done = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    decisions = json.loads((tmp_path / "search" / "table.json").read_text())
    words = {decision["decision"].partition(":")[0] for decision in decisions}
    assert words
    assert words <= {"kept", "dropped", "undecided"}
    assert not [decision for decision in decisions if "Error" in decision["decision"]]
    assert len((tmp_path / "search" / "table.md").read_text().splitlines()) == 2 + len(decisions)
    assert (tmp_path / "search" / "study" / "status.json").is_file()


def test_agent_loop_keeps_only_significant_improvements():
    loop = runpy.run_path(str(LOOP))
    best, new = loop["Proposal"]("best", {"kind": "retention"}), loop["Proposal"]("new", {"kind": "gla"})

    def decide(verdict, state="finished"):
        losses = {"best": 2.0, "new": 1.9}
        rows = [{"entry": name, "validation_loss": {"mean": loss, "margin": 0.01}} for name, loss in losses.items()]
        compared = [{"entry": "best", "verdict": verdict}]
        result = {"state": state, "failed": {}, "summary": rows, "comparisons": compared}
        return loop["decide"](result, best, new).decision

    assert decide("worse") == "kept"
    assert decide("not separated").startswith("dropped")
    assert decide("better").startswith("dropped")
    assert decide(None).startswith("dropped")
    assert decide("worse", state="stopped").startswith("undecided")
