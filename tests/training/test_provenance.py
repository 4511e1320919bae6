"""What a run records of the machine that computed it."""

import json
import subprocess

import pytest
import torch

import seqmix
from seqmix.training.provenance import git_commit, record_session


def test_a_session_is_a_line(config_of, tmp_path):
    for step in (0, 4):
        record_session(tmp_path, config_of("seed=3"), step=step, device=torch.device("cpu"), precision=torch.bfloat16)
    lines = [json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4]
    for line in lines:
        assert (line["seed"], line["device"], line["precision"]) == (3, "cpu", "bfloat16")
        assert (line["seqmix"], line["torch"]) == (seqmix.__version__, torch.__version__)
        assert line["threads"] == torch.get_num_threads()
        assert all(line[name] for name in ("time", "python", "processor", "cores", "system"))


def test_the_commit_is_that_of_the_working_directory(tmp_path, monkeypatch):
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
