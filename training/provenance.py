"""Provenance of a run: one line per start in sessions.jsonl, beside the configuration.

Results are bitwise reproducible on the same machine, with the same versions and the same number of threads.
"""

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import torch

from .config import RunConfig
from .process_groups import ALONE, ProcessGroups

SESSIONS_FILE = "sessions.jsonl"


def record_session(
    run: Path,
    config: RunConfig,
    *,
    step: int,
    device: torch.device,
    precision: torch.dtype,
    groups: ProcessGroups = ALONE,
) -> None:
    """Append a line for a start at `step`: versions, commit, seed, threads, processes, machine."""
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
    with (run / SESSIONS_FILE).open("a") as file:
        file.write(json.dumps(session) + "\n")


def seqmix_version() -> str:
    """The library's version, imported late: the package root imports this module."""
    return import_module((__package__ or "seqmix").partition(".")[0]).__version__


def git_commit(folder: Path) -> str | None:
    """The git commit of a working directory, with a + for uncommitted changes; None without a repository."""
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", folder, *command], capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changes else "")


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
