"""Commands that are killed (SIGKILL) at any moment at which they change a file, and begun again.

A moment is before a file is opened for writing, created, renamed or deleted, a folder made, or a file flushed to disk;
and after a file was created, while it is empty. They are counted by an audit hook, so that each is met exactly.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runs import contents

CHANGES = {"os.rename": "rename", "os.mkdir": "make", "os.remove": "remove", "os.rmdir": "remove", "os.link": "link"}
"""Audit events of what changes a folder."""
EARLIER = b"what stood there before"


class Moments:
    """Notes the moments of this process below a folder, and ends it at one of them."""

    def __init__(self, folder: Path, fatal: int | None) -> None:
        self.folder, self.fatal, self.seen = f"{folder.resolve()}/", fatal, list[str]()
        self.flush, os.fsync = os.fsync, self._fsync
        sys.addaudithook(self._audited)

    def _fsync(self, handle: Any) -> None:
        self._reach("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        self.flush(handle)

    def _audited(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES:
            self._reach(CHANGES[event], arguments[0])
        elif event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self._reach("open", arguments[0])
            if arguments[2] & os.O_CREAT and not os.path.exists(arguments[0]):
                self._reach("create", arguments[0])

    def _reach(self, what: str, path: Any) -> None:
        place = os.path.abspath(os.fsdecode(path))
        if not place.startswith(self.folder):
            return
        self.seen.append(f"{what} {place.removeprefix(self.folder)}")
        if len(self.seen) - 1 == self.fatal:
            if what == "create":
                self.fatal = None
                Path(place).touch()
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, arguments: Sequence[str], fatal: int | None = None) -> tuple[int, list[str]]:
    """The status of a command in a folder, in a fork of this process, and its moments, or its end as text."""
    report = folder.with_suffix(".txt")
    report.write_text("")
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, report.read_text().splitlines()
    status = 1
    try:
        os.chdir(folder)
        output = os.open(report, os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        moments = Moments(folder, fatal)
        from seqmix.cli import main

        sys.argv = ["seqmix", *arguments]
        try:
            main()
        except SystemExit as ended:
            status = int(ended.code or 0)
        sys.stdout.flush()
        if status == 0:
            report.write_text("".join(f"{moment}\n" for moment in moments.seen))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def prepare(arguments: Sequence[str]) -> None:
    """Import what a command needs, for the processes that are forked from this one."""
    import torch

    from seqmix.cli import imported

    torch.set_num_threads(1)
    imported(arguments[0])
    if "hf" in arguments and find_spec("transformers") is not None:
        import seqmix.hf.export  # noqa: F401


def try_moments(
    base: str, where: str, arguments: Sequence[str], new: Sequence[str], replaced: bool, pick: Sequence[int] | None
) -> None:
    """Kill a command at moments of `pick`, or all, each in a folder of its own, and in one folder again and again.

    `new` is what it writes; `replaced` says whether it replaces what stands there. `where`.json gets the moments, and
    the faults of those that were tried.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    prepare(arguments)
    folder = Path(where)
    folder.mkdir()
    faults, moments = {}, undisturbed(Path(base), folder / "whole", arguments)
    tried = [i for i in (range(len(moments)) if pick is None else pick) if i < len(moments)]
    for moment in tried:
        there = folder / f"{moment}"
        shutil.copytree(base, there)
        for name in new if replaced else ():
            (there / name).write_bytes(EARLIER)
        status, said = run(there, arguments, moment)
        if status != -signal.SIGKILL:
            faults[moment] = f"status {status}: {said[-1:]}"
        else:
            faults[moment] = fault_of(Path(base), folder / "whole", there, arguments, new, replaced)
    found = {f"{moments[moment]} ({moment})": fault for moment, fault in faults.items()}
    folder.with_suffix(".json").write_text(json.dumps(found))


def undisturbed(base: Path, folder: Path, arguments: Sequence[str]) -> list[str]:
    """Run a command in a copy of `base`; its moments."""
    shutil.copytree(base, folder)
    status, moments = run(folder, arguments)
    assert status == 0, moments[-5:]
    return moments


def fault_of(
    base: Path, whole: Path, there: Path, arguments: Sequence[str], new: Sequence[str], replaced: bool
) -> str | None:
    """What is wrong with a folder in which a command was killed, or with the same command after that; None if nothing."""
    before, after = contents(base), contents(whole)
    if lost := [
        name for name, content in before.items() if not (there / name).is_file() or content != read(there, name)
    ]:
        return f"lost: {lost}"
    left = {name: state_of(whole / name, there / name) for name in new}
    if halves := [name for name, state in left.items() if state == "half"]:
        return f"half written: {halves}, of which there is {[x for x in contents(there) if x not in before]}"
    if replaced and "absent" in left.values():
        return f"lost what it replaces: {left}"
    status, said = run(there, arguments)
    if status != 0 and not (status == 2 and set(left.values()) == {"whole"}):
        return f"{left}, and begun again: status {status}, {said[-1:]}"
    now = contents(there)
    if now != after:
        return f"begun again, other files: {sorted(name for name in now | after if now.get(name) != after.get(name))}"
    return None


def state_of(whole: Path, there: Path) -> str:
    """Whether what a command writes is `whole`, `absent`, or `half`; and `earlier` if it is what it replaces."""
    if not there.exists():
        return "absent"
    if there.is_file() and there.read_bytes() == EARLIER:
        return "earlier"
    same = contents(there) == contents(whole) if there.is_dir() else there.read_bytes() == whole.read_bytes()
    return "whole" if same else "half"


def read(folder: Path, name: str) -> bytes:
    """The content of a file."""
    return (folder / name).read_bytes()
