"""The conformance matrix matches what the installed packages do."""

import re
import runpy
from pathlib import Path

import pytest
from nightly import NIGHTLY

from seqmix.testing.vectors.cases import vector_cases

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(ROOT / "research" / "conformance_matrix.py"))


def undated(text):
    return re.sub(r"Made on [\d-]+", "Made on", text)


def test_every_adapter_is_defined_in_its_file():
    for each in SCRIPT["IMPLEMENTATIONS"]:
        file, _, name = each.adapter.partition(":")
        assert re.search(rf"^(.*, )?{name}\b.* = ", (ROOT / "examples" / "vectors" / file).read_text(), re.MULTILINE)


def test_page_names_properties_without_a_column():
    page = SCRIPT["PAGE"].read_text(encoding="utf-8")
    without = {
        case.property
        for case in vector_cases()
        if case.property not in SCRIPT["ATTENTION" if case.family == "softmax" else "RECURRENCES"]
    }
    assert "batch" in without
    assert all(f"`{name}`" in page for name in without)


@pytest.mark.slow
@NIGHTLY
def test_page_matches_installed_packages():
    if missing := SCRIPT["missing_packages"]():
        pytest.skip(f"needs {', '.join(missing)}")
    page = SCRIPT["PAGE"].read_text(encoding="utf-8")
    for each in SCRIPT["IMPLEMENTATIONS"]:
        release = SCRIPT["package_version"](each.package)
        if f"| {each.package} {release} |" not in page:
            pytest.skip(f"the page has another release than {each.package} {release}")
    ((file, text),) = SCRIPT["files"]().items()
    assert undated(file.read_text(encoding="utf-8")) == undated(text), "run: python research/conformance_matrix.py"
