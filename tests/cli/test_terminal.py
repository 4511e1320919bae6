"""Console output: a file is as wide as its tables, a terminal keeps its width."""

from io import StringIO

import pytest
from rich.table import Table

from seqmix.cli.console import WIDE, terminal

LONG = "a sentence of some length, " * 10


@pytest.fixture
def table():
    made = Table("run", *(f"column {number}" for number in range(10)))
    made.add_row("gated_delta_net-lr0.002-seed1", *["0.12345"] * 10)
    return made


def test_tables_in_a_file_are_not_folded(table, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    console = terminal()
    console.print(table)
    console.print(LONG)
    written = capsys.readouterr().out
    assert console.width == WIDE
    assert "gated_delta_net-lr0.002-seed1" in written
    assert LONG in written


@pytest.mark.parametrize(("columns", "whole"), [("60", False), ("180", True)])
def test_columns_are_those_of_the_environment(table, monkeypatch, capsys, columns, whole):
    monkeypatch.setenv("COLUMNS", columns)
    terminal().print(table)
    assert ("gated_delta_net-lr0.002-seed1" in capsys.readouterr().out) == whole


def test_names_are_not_markup(capsys):
    terminal().print("runs/[bold]x[/bold]")
    assert "runs/[bold]x[/bold]" in capsys.readouterr().out


def test_a_terminal_is_not_widened(monkeypatch):
    class Screen(StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdout", Screen())
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("TERM", "xterm")
    console = terminal()
    assert (console.is_terminal, console.width, console.soft_wrap) == (True, 70, False)
