"""A stranger's folder as the working directory: the configuration of its repository runs nothing, and no command takes
its files for libraries, plug-ins or settings.

Every program and module here leaves a canary where it is executed.
"""

import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

from abuse.commands import commands, environment, prepared
from abuse.tally import Case

from seqmix.training.checkpoint.provenance import git_commit

GIT = """core.fsmonitor core.hooksPath core.pager core.editor core.sshCommand core.askPass core.gitProxy alias.status
core.attributesFile core.alternateRefsCommand alias.rev-parse alias.config credential.helper diff.external
diff.evil.textconv diff.evil.command filter.evil.clean filter.evil.smudge filter.evil.process filter.a=b.clean
filter.x.y.process gpg.program pager.status pager.config merge.evil.driver uploadpack.packObjectsHook include.path"""
LIBRARIES = """antigravity beartype click conftest datasets einops filelock fla hypothesis jaxtyping json matplotlib
min_gru numpy packaging pandas plotly pyarrow pydantic pytest readline retention rich safetensors sitecustomize
sympy tensorboard tokenizers tomllib torch torchscale transformers triton typer usercustomize vl_convert wandb yaml"""
SETTINGS = {
    "matplotlibrc": "backend: module://stranger\n",
    "pytest.ini": "[pytest]\naddopts = -p stranger\n",
    "stranger-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n",
    "stranger-1.0.dist-info/entry_points.txt": "[seqmix.mixers]\nx = stranger:Config\n[pytest11]\nx = stranger\n",
    "stranger.pth": "import stranger\n",
    "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '-p stranger'\n",
}
"""What libraries read where they find it, naming a module or a plug-in of the folder."""


def surroundings(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Repositories whose configuration names a program, and every command beside files of the names of libraries."""
    canary, program = folder / "canary", folder / "program"
    program.write_text(f"#!/bin/sh\ntouch '{canary}'\ncat\n")
    program.chmod(0o755)
    for number, (key, scope) in enumerate(product(GIT.split(), ("local", "worktree", "bare"))):
        action = partial(_repository, folder / f"repository{number}", key, scope, program, canary)
        yield Case(f"git's {key}, {scope}", action, refused=False)
    base = prepared(folder)
    for module in (*LIBRARIES.split(), "stranger"):
        (base / f"{module}.py").write_text(f"open({str(canary)!r}, 'a').write('{module} ')\n")
    for name, text in SETTINGS.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    for name, arguments in commands().items():
        yield Case(f"{name} beside libraries", partial(_beside, base, folder / name, arguments, canary), refused=False)


def _beside(base: Path, where: Path, arguments: list[str], canary: Path) -> None:
    """A command in a copy of the folder does what it does anywhere."""
    shutil.copytree(base, where)
    done = subprocess.run(
        [sys.executable, "-m", "seqmix", *arguments],
        cwd=where,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=200,
        check=False,
    )
    ran = canary.read_text() if canary.exists() else ""
    canary.unlink(missing_ok=True)
    assert not ran, f"executed: {ran[:200]}"
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-300:]}"


def _repository(at: Path, key: str, scope: str, program: Path, canary: Path) -> None:
    """The commit of a repository whose configuration names a program wherever it can."""

    def git(*arguments: str) -> None:
        names = ("-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *names, *arguments], cwd=at, check=True, capture_output=True, env=environment())

    at.mkdir()
    git("init")
    (at / "file").write_text("one")
    name = key.removeprefix("filter.").rpartition(".")[0] if key.startswith("filter.") else "evil"
    (at / ".gitattributes").write_text(f"* filter={name} diff={name} merge={name}")
    git("add", "file", ".gitattributes")
    git("commit", "-m", "one")
    (hooks := at / "hooks").mkdir()
    for hook in ("post-index-change", "fsmonitor-watchman", "reference-transaction", "post-checkout", "pre-auto-gc"):
        (hooks / hook).symlink_to(program)
    (at / "more").write_text(f'[core]\nfsmonitor = {program}\n[filter "evil"]\nclean = {program}\n')
    value = {"core.hooksPath": hooks, "include.path": at / "more", "core.attributesFile": at / ".gitattributes"}
    if scope == "worktree":
        git("config", "extensions.worktreeConfig", "true")
    git("config", *(["--worktree"] if scope == "worktree" else []), key, str(value.get(key, program)))
    if scope == "bare":  # what holds a repository's files is one itself
        git("config", "core.worktree", str(at))
        for part in (at / ".git").iterdir():
            part.rename(at / part.name if not (at / part.name).exists() else at / f"{part.name}.old")
        (at / ".git").rmdir()
    (at / "file").write_text("two")
    commit, ran = git_commit(at), canary.exists()
    canary.unlink(missing_ok=True)
    assert not ran, "it was executed"
    assert commit is not None or scope == "bare", "no commit"
    assert commit is None or commit.endswith("+"), f"the change is not seen: {commit}"
