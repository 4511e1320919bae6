"""The bugs of docs/explanation/found-in-others.md: the page's code shows each, and the kit or the vectors find it."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from seqmix.cli import app as cli
from seqmix.testing.vectors.write import write_vectors

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "explanation" / "found-in-others.md").read_text()
ROWS = re.findall(r"^\| \[([\w-]+)\]\(#[\w-]+\) \| ([\d.]+) \|", PAGE, re.MULTILINE)
SECTIONS = {name: text for name, _, text in (part.partition("\n") for part in PAGE.split("\n## ")[1:])}


def test_every_row_has_a_section():
    assert len(ROWS) >= 7
    assert {name for name, _ in ROWS} == SECTIONS.keys()


def require_release(package, release):
    try:
        installed = version(package)
    except PackageNotFoundError:
        pytest.skip(f"needs pip install --no-deps {package}=={release}")
    if installed != release:
        pytest.skip(f"the page is about {package} {release}, {installed} is installed")


@pytest.mark.slow
@pytest.mark.parametrize(("package", "release"), dict.fromkeys(ROWS))
def test_code_blocks_of_the_page_show_the_bug(package, release):
    require_release(package, release)
    blocks = re.findall(r"```py\n(.*?)```", SECTIONS[package], re.DOTALL)
    assert blocks
    for lines in blocks:
        exec(compile(lines, package, "exec"), {})


CHECKED = [row for row in dict.fromkeys(ROWS) if "seqmix check" in SECTIONS[row[0]]]
VECTORS = [row for row in dict.fromkeys(ROWS) if "runner.py" in SECTIONS[row[0]]]


def test_every_row_has_a_check_or_vector_command():
    assert {*CHECKED, *VECTORS} == {*ROWS}


@pytest.mark.slow
@pytest.mark.parametrize(("package", "release"), CHECKED)
def test_conformance_kit_finds_the_bug(package, release, monkeypatch, capsys):
    require_release(package, release)
    ((arguments, name),) = re.findall(r"^seqmix check (\S+ --only (\w+))$", SECTIONS[package], re.MULTILINE)
    monkeypatch.chdir(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr("sys.argv", ["seqmix", "check", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert f"{name}:" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("package", "release"), VECTORS)
def test_test_vectors_find_the_bug(package, release, tmp_path):
    require_release(package, release)
    ((adapter, families),) = re.findall(
        r"^python vectors/runner.py (\S+) --families (.+)$", SECTIONS[package], re.MULTILINE
    )
    write_vectors(tmp_path / "vectors", tuple(families.split()))
    command = [sys.executable, str(tmp_path / "vectors" / "runner.py"), str(ROOT / adapter), "--families"]
    ended = subprocess.run([*command, *families.split()], capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    for failure in ("delta/per_key/strong_decay (gradients)", "scan/chunk_and_one (chunk + 1)"):
        assert f"FAILED {failure}" in ended.stdout
