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
from functools import cache
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
    """Append a line to sessions.jsonl for a start or resumption of a run.

    The line has the versions, git commit, seed, threads, processes and machine.

    Args:
        run: the run directory.
        config: the run.
        step: number of steps completed at the start.
        device: the device of training.
        precision: the dtype of matrix products.
        groups: the processes of the run.
        start_from: the origin of the initial weights, with training.start_from.
    """
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
    """Return the top-level modules outside the library that a configuration uses, and the source of each.

    The source is the distribution as pip names it (name==version), or the module's file if it is in no distribution.
    """
    settings = config.training
    paths = (name for name in (settings.optimizer, settings.schedule, *settings.loggers) if ":" in name)
    names = {name.partition(".")[0] for name in (*_modules(config), *(path.partition(":")[0] for path in paths))}
    names -= {(__package__ or "seqmix").partition(".")[0], "torch"}
    return {name: _source(name) for name in sorted(names)}


def missing_plug_ins(run: Path) -> str:
    """Return the end of an error message, which names the modules that a run used and that are not installed here.

    It is empty if none is missing.
    """
    try:
        *_, last = (run / SESSIONS_FILE).read_text(encoding="utf-8").splitlines()
        used = dict(json.loads(last).get("plug_ins", {}))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return ""
    missing = [(name, source) for name, source in used.items() if find_spec(name) is None]
    sentences = (
        f"the run used the module {name}, which is not installed here: pip install {source}"
        if "==" in source
        else f"the run used the module {name} ({source}), which cannot be found here"
        for name, source in missing
    )
    return "".join(f"; {sentence}" for sentence in sentences)


def _modules(value: Any) -> Iterator[str]:
    """Yield the modules of all classes in a configuration."""
    if isinstance(value, Config):
        yield type(value).__module__
        value = {name: getattr(value, name) for name in type(value).model_fields}
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else ()
    for child in children:
        yield from _modules(child)


def _source(module: str) -> str:
    """Return the distribution and version of a module (name==version), or its file."""
    return _distribution(module) or str(getattr(sys.modules.get(module), "__file__", None) or "defined in the program")


@cache
def _distribution(module: str) -> str | None:
    """Return the distribution of a module, and its version (name==version); None if it is in none."""
    # entry points also find an editable installation, whose files are elsewhere
    entry_points = ((d.name, point.value) for d in metadata.distributions() for point in d.entry_points)
    installed = [name for name, value in entry_points if re.match(rf"{module}\b", value)]
    installed += metadata.packages_distributions().get(module, [])
    if installed:
        return f"{installed[0]}=={metadata.version(installed[0])}"
    return None


def seqmix_version() -> str:
    """Return the library's version; it is imported late, as the package root imports this module."""
    return import_module((__package__ or "seqmix").partition(".")[0]).__version__


def git_commit(folder: Path) -> str | None:
    """Return the git commit of a working directory, with a + for uncommitted changes; None without a repository.

    The repository may be untrusted, so no program that its configuration names is run.
    """
    restrictions = {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none"}

    def git(*arguments: str, disabled: Sequence[str] = ()) -> str:
        # set in the environment, as names may contain an equals sign: `-c a=b.clean=` would set `a`
        settings = {"core.fsmonitor": "false", "core.hooksPath": os.devnull} | dict.fromkeys(disabled, "")
        variables = {"GIT_CONFIG_COUNT": str(len(settings))}
        for number, (name, value) in enumerate(settings.items()):
            variables |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
        command = ["git", "-C", str(folder), *arguments]
        environment = os.environ | restrictions | variables
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=environment)
        return result.stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        # filters are programs: switch off those that the repository configures, but not the user's own (Git LFS)
        lines = git("config", "--show-scope", "--includes", "--name-only", "--list").splitlines()
        names = [name for scope, _, name in (line.partition("\t") for line in lines) if scope in ("local", "worktree")]
        filters = [name for name in names if name.startswith("filter.")]
        status = ("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
        changes = git(*status, disabled=filters)
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changes else "")


def _processor() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine()
