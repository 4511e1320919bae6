"""Console output: tables written to a file are not wrapped, and a terminal keeps its width."""

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


def test_tables_written_to_a_file_are_not_wrapped(table, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    console = terminal()
    console.print(table)
    console.print(LONG)
    written = capsys.readouterr().out
    assert console.width == WIDE
    assert "gated_delta_net-lr0.002-seed1" in written
    assert LONG in written


@pytest.mark.parametrize(("columns", "whole"), [("60", False), ("180", True)])
def test_columns_variable_sets_the_width(table, monkeypatch, capsys, columns, whole):
    monkeypatch.setenv("COLUMNS", columns)
    terminal().print(table)
    assert ("gated_delta_net-lr0.002-seed1" in capsys.readouterr().out) == whole


def test_brackets_in_names_are_not_treated_as_markup(capsys):
    terminal().print("runs/[bold]x[/bold]")
    assert "runs/[bold]x[/bold]" in capsys.readouterr().out


def test_terminal_keeps_its_width(monkeypatch):
    class Screen(StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdout", Screen())
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("TERM", "xterm")
    console = terminal()
    assert (console.is_terminal, console.width, console.soft_wrap) == (True, 70, False)
