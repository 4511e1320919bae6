"""The bugs of docs/explanation/found-in-others.md: the page's lines show each, and the kit refuses the layer."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from seqmix import cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "explanation" / "found-in-others.md").read_text()
ROWS = re.findall(r"^\| \[([\w-]+)\]\(#[\w-]+\) \| ([\d.]+) \|", PAGE, re.MULTILINE)
SECTIONS = {name: text for name, _, text in (part.partition("\n") for part in PAGE.split("\n## ")[1:])}


def test_every_row_has_its_section():
    assert len(ROWS) >= 7
    assert {name for name, _ in ROWS} == SECTIONS.keys()


@pytest.mark.slow
@pytest.mark.parametrize(("package", "release"), ROWS, ids=[name for name, _ in ROWS])
def test_the_lines_show_it_and_the_kit_refuses_it(package, release, monkeypatch, capsys):
    try:
        installed = version(package)
    except PackageNotFoundError:
        pytest.skip(f"needs pip install --no-deps {package}=={release}")
    assert installed == release

    (lines,) = re.findall(r"```py\n(.*?)```", SECTIONS[package], re.DOTALL)
    exec(compile(lines, package, "exec"), {})

    ((arguments, name),) = re.findall(r"^seqmix check (\S+ --only (\w+))$", SECTIONS[package], re.MULTILINE)
    monkeypatch.chdir(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr("sys.argv", ["seqmix", "check", *arguments.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert f"{name}:" in capsys.readouterr().out
