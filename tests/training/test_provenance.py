"""Records of a run's code: the Git commit and the plugins."""

import json
import subprocess
import sys

import pytest
from small_runs import refusal, run_of

from seqmix import load_run
from seqmix.training.checkpoint.provenance import git_commit


def test_git_commit_returns_head_and_marks_uncommitted_changes(tmp_path, monkeypatch):
    def git(*arguments):
        names = ("-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit(tmp_path) is None
    try:
        git("init")
    except OSError:
        pytest.skip("needs git")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    head = git("rev-parse", "HEAD").stdout.strip()
    (tmp_path / "another").write_text("not of it")
    assert git_commit(tmp_path) == head
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == f"{head}+"
    monkeypatch.setenv("PATH", "")
    assert git_commit(tmp_path) is None


@pytest.mark.parametrize("name", ["evil", "a=b"])
def test_git_commit_runs_no_program_configured_by_the_repository(tmp_path, monkeypatch, name):
    def git(*arguments):
        names = ("-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *names, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    git("init")
    (tmp_path / "file").write_text("one")
    (tmp_path / ".gitattributes").write_text(f"* filter={name}")
    git("add", "file", ".gitattributes")
    git("commit", "-m", "one")
    (program := tmp_path / "program").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\ncat\n")
    program.chmod(0o755)
    for key in ("core.fsmonitor", f"filter.{name}.clean", f"filter.{name}.process"):
        git("config", key, str(program))
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD").stdout.strip() + "+"
    assert not (tmp_path / "ran").exists()


PLUG_IN = """
from typing import Literal

from seqmix.mixers.retention import RetentionConfig


class OwnConfig(RetentionConfig):
    kind: Literal["own"] = "own"
"""


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False])
def test_run_names_its_missing_plugin(config_of, tmp_path, monkeypatch, installed):
    module = "own_plug_in" if installed else "own_file"  # the distribution of a module is found once
    (tmp_path / f"{module}.py").write_text(PLUG_IN)
    if installed:
        (about := tmp_path / "some_plug_in-1.2.dist-info").mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: some-plug-in\nVersion: 1.2\n")
        (about / "top_level.txt").write_text("own_plug_in\n")
    mixer = f"model.blocks.ret.mixer={{kind: {module}:OwnConfig, n_heads: 2}}"
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        run_of(config_of("training.steps=2", mixer), tmp_path / "run")
        run_of(config_of("training.steps=2"), tmp_path / "plain")
        load_run(tmp_path / "run")
    sys.modules.pop(module)
    source = "pip install some-plug-in==1.2" if installed else str(tmp_path / "run" / "code")
    message = refusal(lambda: load_run(tmp_path / "run"))
    # a run carries a copy of a file; of a package, it knows the name
    assert (f"the run used the module {module}" if installed else f"{module} cannot be found here, but") in message
    assert source in message
    assert "plug_ins" not in json.loads((tmp_path / "plain" / "sessions.jsonl").read_text())
