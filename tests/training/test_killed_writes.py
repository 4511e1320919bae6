"""A command killed while it writes a folder or file leaves it complete or absent, and can be run again.

It is killed when it flushes or renames a file; tests/abuse/crashes.py tries all other moments too.
"""

import json
from pathlib import Path

import killed_commands
import pytest
import torch

from seqmix.training import load_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return killed_commands.made_base(tmp_path_factory.mktemp("killed") / "base")


@pytest.fixture
def require_held(processes, tmp_path):
    """Call a function of `killed` in a process of its own: nothing is wrong after at least as many kills."""

    def call(least: int, function, base: Path, *arguments) -> None:
        process = processes.Process(target=function, args=(f"{base}", f"{tmp_path / 'tried'}", *arguments))
        process.start()
        process.join(300)
        assert process.exitcode == 0
        found = json.loads((tmp_path / "tried.json").read_text())
        faults = [f"{moment}: {fault}" for moment, fault in found.items() if fault is not None]
        print(f"killed {len(found)} times, held {len(found) - len(faults)}")
        assert not faults, "\n".join(faults)
        assert len(found) >= least

    return call


@pytest.mark.parametrize("command", killed_commands.COMMANDS)
def test_killed_command_leaves_complete_output_or_none_and_can_rerun(require_held, base, tmp_path, command):
    if command == "export-hf":
        pytest.importorskip("transformers")
    arguments, new = killed_commands.COMMANDS[command]
    kinds = ("rename",) if command == "convert" else ("fsync", "rename")  # it writes as average does
    require_held(2, killed_commands.attempt, base, arguments, new, False, kinds)
    if command in ("average", "convert"):
        again = next((tmp_path / "tried").glob("[0-9]*/new"))
        ours, theirs = (load_run(folder).state_dict() for folder in (tmp_path / "tried/whole/new", again))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_training_killed_during_startup_can_be_resumed_or_restarted(require_held, base):
    require_held(6, killed_commands.attempt_start, base)
