"""Killed at any moment, a command that writes a folder or a file leaves it whole or absent, and may be begun again.

A sample of the moments; tests/abuse/crashes.py has all.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import killed
import pytest
from runs import run_of

from seqmix.convert import export_to
from seqmix.models import train_bpe

LLAMA = (
    "model={norm: {kind: rmsnorm}, vocab_size: 280, blocks: {attn: {mixer: {kind: attention, n_heads: 4, positions: rope}, "
    "ffn: {kind: swiglu, expansion: 2.0}, norm: {kind: rmsnorm}}}}"
)
"""A model that transformers has too."""
COMMANDS = {
    "average": (["average", "run", "--to", "new"], ["new"]),
    "convert": (["convert", "theirs", "--to", "new"], ["new"]),
    "convert-as": (["convert", "run", "--as", "llama", "--to", "new"], ["new"]),
    "export": (["export", "run", "--out", "new.safetensors"], ["new.safetensors"]),
    "export-hf": (["export", "run", "--to", "hf", "new"], ["new"]),
    "tokenize": (["tokenize", "text.txt", "--train-bpe", "270", "--out", "new.tokens"], ["new.tokens", "new.json"]),
}
"""Command lines, and what each writes."""


@pytest.fixture
def base(config_of, tmp_path) -> Path:
    """A folder with a text, a run with a tokenizer and several checkpoints, and it as a folder of transformers."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "text.txt").write_text("the text of a small run, over and over again. " * 60)
    train_bpe([("text", (folder / "text.txt").read_bytes())], 280, folder / "words.json")
    changes = [f"data.paths=[{folder / 'text.txt'}]", f"data.tokenizer={folder / 'words.json'}", "model.n_layers=1"]
    run_of(config_of(LLAMA, "model.d_model=16", *changes, preset="attention-tiny"), folder / "run")
    export_to(folder / "run", folder / "theirs", "llama", tell=print)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_killed_at_any_moment_writes_all_or_nothing_and_may_be_begun_again(
    processes, base, tmp_path, command
):
    arguments, new = COMMANDS[command]
    if "hf" in arguments and find_spec("transformers") is None:
        pytest.skip("needs transformers")
    process = processes.Process(
        target=killed.try_moments, args=(f"{base}", f"{tmp_path / 'tried'}", arguments, new, False, None)
    )
    process.start()
    process.join(300)
    assert process.exitcode == 0
    found = json.loads((tmp_path / "tried.json").read_text())
    print(len(found), *found, sep="\n")
    faults = [f"{moment}: {fault}" for moment, fault in found.items() if fault is not None]
    assert not faults, f"{len(faults)} of {len(found)}:\n" + "\n".join(faults)
