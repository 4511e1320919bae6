"""Provenance of a run: one line per start in sessions.jsonl, beside the configuration.

Results are bitwise reproducible on the same machine, with the same versions and the same number of threads.
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...registry import Config
from ..config import RunConfig
from ..distributed.process_groups import ALONE, ProcessGroups

SESSIONS_FILE = "sessions.jsonl"


def record_session(
    run: Path,
    config: RunConfig,
    *,
    step: int,
    device: torch.device,
    precision: torch.dtype,
    groups: ProcessGroups = ALONE,
    start_from: Mapping[str, str] | None = None,
) -> None:
    """Append a line for a start at `step`: versions, commit, seed, threads, processes, machine, and where the weights
    came from."""
    session = {
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": config.seed,
        "seqmix": seqmix_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git_commit(Path.cwd()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "precision": str(precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processes": groups.size,
        "distributed": {"data": groups.data, "shard": groups.shard, "context_parallel": groups.context_parallel},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }
    if start_from is not None:
        session["start_from"] = start_from
    if plug_ins := plug_ins_of(config):
        session["plug_ins"] = plug_ins
    with (run / SESSIONS_FILE).open("a") as file:
        file.write(json.dumps(session) + "\n")


def plug_ins_of(config: RunConfig) -> dict[str, str]:
    """The top-level modules outside the library that a configuration uses: each one's distribution and version, as
    pip names them (name==version), or its file where none has it.
    """
    settings = config.training
    paths = (name for name in (settings.optimizer, settings.schedule, *settings.loggers) if ":" in name)
    names = {name.partition(".")[0] for name in (*_modules(config), *(path.partition(":")[0] for path in paths))}
    names -= {(__package__ or "seqmix").partition(".")[0], "torch"}
    return {name: _source(name) for name in sorted(names)}


def missing_plug_ins(run: Path) -> str:
    """The end of a sentence about a run that cannot be loaded: what it used that is missing here, or nothing."""
    try:
        *_, last = (run / SESSIONS_FILE).read_text(encoding="utf-8").splitlines()
        used = dict(json.loads(last).get("plug_ins", {}))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return ""
    lacking = [(name, source) for name, source in used.items() if find_spec(name) is None]
    said = (
        f"the run used the module {name}: pip install {source}"
        if "==" in source
        else f"the run used the module {name}, which was {source}"
        for name, source in lacking
    )
    return "".join(f"; {sentence}" for sentence in said)


def _modules(value: Any) -> Iterator[str]:
    """The modules of all classes of a configuration."""
    if isinstance(value, Config):
        yield type(value).__module__
        value = {name: getattr(value, name) for name in type(value).model_fields}
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    for child in children:
        yield from _modules(child)


def _source(module: str) -> str:
    # what it offers names an editable installation, whose files are elsewhere
    offered = ((d.name, point.value) for d in metadata.distributions() for point in d.entry_points)
    installed = [name for name, value in offered if re.match(rf"{module}\b", value)]
    installed += metadata.packages_distributions().get(module, [])
    if installed:
        return f"{installed[0]}=={metadata.version(installed[0])}"
    return str(getattr(sys.modules.get(module), "__file__", None) or "defined in the program")


def seqmix_version() -> str:
    """The library's version, imported late: the package root imports this module."""
    return import_module((__package__ or "seqmix").partition(".")[0]).__version__


def git_commit(folder: Path) -> str | None:
    """The git commit of a working directory, with a + for uncommitted changes; None without a repository.

    Nothing runs that the repository's configuration names: a folder of someone else's may be one.
    """
    quiet = {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none"}

    def git(*arguments: str, off: Sequence[str] = ()) -> str:
        # by the environment, as `-c a=b.clean=` would set `a`: names may have an equals sign
        settings = {"core.fsmonitor": "false", "core.hooksPath": os.devnull} | dict.fromkeys(off, "")
        named = {"GIT_CONFIG_COUNT": str(len(settings))}
        for number, (name, value) in enumerate(settings.items()):
            named |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
        command = ["git", "-C", str(folder), *arguments]
        environment = os.environ | quiet | named
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=environment)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        # filters of the repository's own configuration are programs; those of the user (Git LFS) are not its choice
        named = git("config", "--show-scope", "--includes", "--name-only", "--list").splitlines()
        own = [name for scope, _, name in (line.partition("\t") for line in named) if scope in ("local", "worktree")]
        off = [name for name in own if name.startswith("filter.")]
        status = ("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
        changes = git(*status, off=off)
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changes else "")


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
