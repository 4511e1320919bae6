"""The example plug-in, without installing it: nothing in the library knows it, and a slip in it is found."""

import importlib
import sys
from pathlib import Path

import pytest

from seqmix.mixers.testing import check_mixer

SOURCE = Path(__file__).parents[1] / "examples" / "plugin" / "seqmix_mingru" / "__init__.py"
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


def test_it_keeps_the_contract(mingru):
    assert len(SOURCE.read_text().splitlines()) < 120
    report = check_mixer(mingru(), examples=20, compiles=False)
    assert report.passed, report.failures[0].reason


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_in_one_line_is_found_on_three_tokens_or_fewer(mingru, slip):
    *lines, name = SLIPS[slip]
    config = mingru(*lines)
    (failure,) = check_mixer(config, checks=[name]).failures
    assert failure.case.length <= 3
