"""Killed at any moment, a command that writes a folder or a file leaves it whole or absent, and may be begun again.

The moments at which it flushes and renames; tests/abuse/crashes.py has all.
"""

import json
from pathlib import Path

import killed
import pytest
import torch

from seqmix.training import load_run


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return killed.made_base(tmp_path_factory.mktemp("killed") / "base")


@pytest.mark.parametrize("command", killed.COMMANDS)
def test_a_killed_command_has_written_all_or_nothing_and_may_be_begun_again(processes, base, tmp_path, command):
    if command == "export-hf":
        pytest.importorskip("transformers")
    arguments, new = killed.COMMANDS[command]
    given = (f"{base}", f"{tmp_path / 'tried'}", arguments, new, False, ("fsync", "rename"))
    process = processes.Process(target=killed.attempt, args=given)
    process.start()
    process.join(300)
    assert process.exitcode == 0
    found = json.loads((tmp_path / "tried.json").read_text())
    faults = [f"{moment}: {fault}" for moment, fault in found.items() if fault is not None]
    print(f"{command}: killed {len(found)} times, held {len(found) - len(faults)}")
    assert not faults, "\n".join(faults)
    assert len(found) > 6
    if command in ("average", "convert"):
        ours, theirs = (load_run(tmp_path / f"tried/{name}/new").state_dict() for name in ("whole", "chain"))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
