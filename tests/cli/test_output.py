"""Commands whose output is closed or cannot be written, and what a terminal shows."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from conftest import SMALL

from seqmix import load_config, train
from seqmix.cli import console
from seqmix.cli.app import main
from seqmix.cli.commands import generate
from seqmix.training.monitoring.measurements import read_measurements


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run a command in a folder with a run, its output a closed pipe or a full disk; returns its exit status."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("the text of a small run, over and over again. " * 60)
    list(train(load_config("retnet-tiny", [*SMALL, "data.paths=[text.txt]"]), "run"))

    def call(output: str, *arguments: str) -> int:
        if output == "closed":
            reads, handle = os.pipe()
            os.close(reads)
        else:
            handle = os.open(output, os.O_WRONLY)
        with open(handle, "w", encoding="utf-8") as stream:
            monkeypatch.setattr(sys, "argv", ["seqmix", *arguments])
            monkeypatch.setattr(sys, "stdout", stream)
            with pytest.raises(SystemExit) as ended:
                main()
            with contextlib.suppress(OSError):
                sys.stdout.close()
        return int(ended.value.code or 0)

    return call


def test_closed_output_pipe_does_not_lose_the_work(command, capsys):
    assert command("closed", "generate", "run", "--prompt", "a", "--save-state", "state", "--max-new-tokens", "9") == 0
    assert command("closed", "evaluate", "run", "--length", "16", "--tokens", "64", "--json", "found.json") == 0
    assert command("closed", "train", "retnet-tiny", *SMALL, "data.paths=[text.txt]", "--out", "other") == 0
    assert Path("state").stat().st_size > 0
    assert json.loads(Path("found.json").read_text())
    assert [each.name for each in Path("other/checkpoints").iterdir()][-1:]
    assert command("closed", "generate", "run", "--prompt", "a", "--max-new-tokens", "999999", "--no-compile") == 141
    assert "error" not in capsys.readouterr().err


def test_full_disk_reports_one_line_error(command, capsys):
    for arguments in (("show", "retnet-tiny"), ("generate", "run", "--prompt", "a"), ("mixers",)):
        assert command("/dev/full", *arguments) == 3
        assert capsys.readouterr().err == "error: standard output cannot be written: No space left on device\n"


HOSTILE = "\x1b]0;title\x07 \x9b2J \u202e\r"


class _Screen(StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stream", "escaped"), [(_Screen, True), (StringIO, False)])
def test_control_characters_are_escaped_only_on_a_terminal(monkeypatch, stream, escaped):
    streams = {name: stream() for name in ("stdout", "stderr")}
    for name, made in streams.items():
        monkeypatch.setattr(sys, name, made)
    monkeypatch.setenv("TERM", "xterm")
    generate._print_texts([HOSTILE], [["\x1bc"]], runs_to_end=False)
    console.terminal().print(HOSTILE, console.plain_table("column", rows=[[HOSTILE]]))
    console.note(HOSTILE)
    for written in (made.getvalue() for made in streams.values()):
        assert ("\x1b]0;title" in written) != escaped
        assert (r"\x1b]0;title" in written) == escaped
        assert not escaped or not {"\x07", "\x9b", "\u202e", "\r"} & set(written)
    assert ("\x1bc" in streams["stdout"].getvalue()) != escaped


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
import {module}
def interrupt(*arguments, **options):
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.raise_signal(signal.SIGINT)
{module}.{name} = interrupt
from seqmix.cli.app import main
sys.argv = ["seqmix", *{arguments}]
main()
"""


@pytest.mark.parametrize(
    ("module", "name"), [("importlib", "import_module"), ("seqmix.training", "load_config")], ids=["import", "command"]
)
def test_repeated_interrupt_shows_no_traceback(module, name):
    program = INTERRUPTED.format(module=module, name=name, arguments=["show", "retnet-tiny"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "x"}, "RANK to be a number.* got 'x'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE to be a number.* got 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, r"the 2 processes \(WORLD_SIZE\).*MASTER_ADDR"),
    ],
)
def test_invalid_torchrun_environment_reports_one_line_error(refused, monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert re.search(words, refused("train", "retnet-tiny", *SMALL, "data.paths=[text.txt]"))


@pytest.mark.slow
def test_files_in_the_working_directory_do_not_shadow_libraries(tmp_path):
    for name in ("typer", "einops", "triton"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} of this folder')")
    command = [sys.executable, "-m", "seqmix", "show", "retnet-tiny"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("extends: ./pipe.yaml", "pipe.yaml .*a pipe or device"),
        ("extends: /dev/zero", "/dev/zero .*a pipe or device"),
        ("extends: retnet-tiny\ndata: {tokenizer: pipe.yaml}", "pipe.yaml .*a pipe or device"),
        ("model: " + "[" * 10**5 + "]" * 10**5, "nested too deeply"),
        ("extends: " + "x" * 299_000, r"x \[297,.* characters\] "),
    ],
    ids=["pipe", "device", "tokenizer", "nested", "long"],
)
def test_hostile_config_reports_a_short_error(refused, document, words):
    os.mkfifo("pipe.yaml")
    Path("hostile.yaml").write_text(document)
    message = refused("train", "hostile.yaml", "--dry-run", status=3 if "tokenizer" in document else 2)
    assert re.search(words, message)
    assert len(message) < 2500


@pytest.mark.parametrize("line", ["[" * 10**5 + "]" * 10**5, "{}"])
def test_too_deeply_nested_metrics_line_is_skipped(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + '\n{"step": 1}\n')
    assert read_measurements(tmp_path) == [{"step": 1}]
