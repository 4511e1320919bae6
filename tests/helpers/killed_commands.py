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
from contextlib import suppress
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from small_runs import contents

from seqmix import load_config, train
from seqmix.cli import app as cli
from seqmix.interop.convert import export_to
from seqmix.models import train_bpe

KINDS = "fsync", "rename", "create", "open", "make", "remove", "link", "chain"
"""Of moments, and the chain of all of them."""
CHANGES = {"os.rename": "rename", "os.mkdir": "make", "os.remove": "remove", "os.rmdir": "remove", "os.link": "link"}
"""Audit events of what changes a folder."""
EARLIER = b"what stood there before"
SMALL = (
    *("model.n_layers=1", "model.d_model=16", "data.sequence_length=16", "training.steps=3", "training.batch_size=2"),
    *("training.evaluation_batches=1", "training.final_evaluation_batches=1", "training.checkpoint_every=1"),
    "model={norm: {kind: rmsnorm}, vocab_size: 280, blocks: {attn: {mixer: {kind: attention, n_heads: 4, positions: "
    "rope}, ffn: {kind: swiglu, expansion: 2.0}, norm: {kind: rmsnorm}}}}",  # a model that transformers has too
)
COMMANDS = {
    "average": (["average", "run", "new"], ["new"]),
    "convert": (["convert", "theirs", "new"], ["new"]),
    "convert-as": (["convert", "run", "new", "--as", "llama"], ["new"]),
    "export": (["export", "run", "--out", "new.safetensors"], ["new.safetensors"]),
    "export-hf": (["export", "run", "--to", "hf", "new"], ["new"]),
    "tokenize": (["tokenize", "text.txt", "--train-bpe", "270", "--out", "new.tokens"], ["new.tokens", "new.json"]),
}
"""Command lines, and what each writes."""


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
        sys.argv = ["seqmix", *arguments]
        try:
            cli.main()
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


def made_base(folder: Path) -> Path:
    """A new folder with text.txt, a run with a tokenizer and three checkpoints, and the run as transformers has it."""
    folder.mkdir()
    (folder / "text.txt").write_text("the text of a small run, over and over again. " * 60)
    train_bpe([("text", (folder / "text.txt").read_bytes())], 280, folder / "words.json")
    changes = [f"data.paths=[{folder / 'text.txt'}]", f"data.tokenizer={folder / 'words.json'}", *SMALL]
    for _ in train(load_config("attention-tiny", changes), folder / "run"):
        pass
    export_to(folder / "run", folder / "theirs", "llama", on_note=print)
    return folder


def attempt(
    base: str, where: str, arguments: Sequence[str], new: Sequence[str], replaced: bool, kinds: Sequence[str]
) -> None:
    """Kill a command at all moments of some kinds, each in a folder of its own; as a chain, in one folder.

    `new` is what it writes; `replaced` says whether it replaces what stands there. The file `where`.json gets a name
    for each kill, and what is wrong after it.
    """
    import torch

    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    cli.import_command(arguments[0])  # before processes are forked from this one
    if "hf" in arguments:
        import_module("seqmix.interop.hf.export")
    command = Command(Path(base), Path(where), arguments, new, replaced)
    faults = dict[str, str | None]()
    for number, moment in enumerate(command.moments):
        if moment.split()[0] in kinds:
            there = command.folder(f"{number}")
            status, said = run(there, arguments, number)
            killed = status == -signal.SIGKILL
            faults[f"{moment} ({number})"] = command.fault(there) if killed else f"status {status}: {said[-1:]}"
    if "chain" in kinds:
        faults |= command.chain()
    Path(where).with_suffix(".json").write_text(json.dumps(faults))


def attempt_start(base: str, where: str) -> None:
    """Kill a training at moments of its start, resume it, or begin it again where there is nothing to resume."""
    import torch

    torch.set_num_threads(1)
    cli.import_command("train")
    changes = ["data.paths=[text.txt]", "data.tokenizer=words.json", *SMALL, "training.checkpoint_every=3"]
    command = Command(Path(base), Path(where), ["train", "attention-tiny", *changes, "--out", "new"], ["new"], False)
    started = next(number for number, moment in enumerate(command.moments) if moment.endswith("sessions.jsonl"))
    faults = dict[str, str | None]()
    for number, moment in enumerate(command.moments[: started + 1]):
        if moment.split()[0] not in ("create", "fsync", "rename"):
            continue
        there = command.folder(f"{number}")
        status, said = run(there, command.arguments, number)
        if status == -signal.SIGKILL:
            begun = (there / "new/config.yaml").exists()
            status, said = run(there, ["train", "--resume", "new"] if begun else command.arguments)
        ours, theirs = (canonical(folder / "new") for folder in (there, command.whole))
        compared = [name for name in theirs if name.endswith(("model.safetensors", "config.yaml", "tokenizer.json"))]
        others = [name for name in compared if ours.get(name) != theirs[name]]
        faults[f"{moment} ({number})"] = (
            f"status {status}: {said[-1:]}, other files: {others}" if status or others else None
        )
    Path(where).with_suffix(".json").write_text(json.dumps(faults))


class Command:
    """A command with a folder in which nothing has happened to it."""

    def __init__(self, base: Path, where: Path, arguments: Sequence[str], new: Sequence[str], replaced: bool) -> None:
        self.base, self.where, self.arguments, self.new, self.replaced = base, where, arguments, new, replaced
        where.mkdir()
        self.whole = self.folder("whole")
        status, self.moments = run(self.whole, arguments)
        assert status == 0, self.moments[-5:]

    def folder(self, name: str) -> Path:
        """A new folder for the command."""
        there = self.where / name
        shutil.copytree(self.base, there)
        for file in self.new if self.replaced else ():
            (there / file).write_bytes(EARLIER)
        return there

    def chain(self) -> dict[str, str | None]:
        """Kill it at its first moment, and again at its second one, and so on, in one folder, until it ends."""
        there, faults = self.folder("chain"), dict[str, str | None]()
        for number in count():
            status, said = run(there, self.arguments, number)
            whole = all(state == "whole" for state in self.states(there).values())
            if status != -signal.SIGKILL:
                ended = status == 0 or (status in (2, 3) and whole)
                fault = self.fault(there) if ended else f"status {status}: {said[-1:]}"
                return faults | {f"the end of the chain ({number})": fault}
            faults[f"the chain ({number})"] = self.half(there)
        raise AssertionError

    def states(self, there: Path) -> dict[str, str]:
        """What there is of what it writes: `whole`, `absent`, `half`, or `earlier` if it is what it replaces."""
        return {name: state_of(self.whole / name, there / name) for name in self.new}

    def half(self, there: Path) -> str | None:
        """What is half written or lost in a folder in which it was killed; None if nothing."""
        before, now = contents(self.base), contents(there)
        if lost := [name for name, content in before.items() if now.get(name) != content]:
            return f"lost: {lost}"
        states = self.states(there)
        first, *others = states.values()  # the first appears last
        incomplete = first == "whole" and not {*others} <= {"whole"}
        if "half" in states.values() or (self.replaced and "absent" in states.values()) or incomplete:
            return f"{states}, of which there is {sorted(now.keys() - before.keys())}"
        return None

    def fault(self, there: Path) -> str | None:
        """What is wrong with a folder in which it was killed, or after it was begun again there; None if nothing."""
        if fault := self.half(there):
            return fault
        states = self.states(there)
        status, said = run(there, self.arguments)
        if status != 0 and not (status in (2, 3) and set(states.values()) == {"whole"}):
            return f"{states}, and begun again: status {status}, {said[-1:]}"
        now, after = canonical(there), canonical(self.whole)
        others = sorted(name for name in now | after if now.get(name) != after.get(name))
        return f"begun again, other files: {others}" if others else None


def state_of(whole: Path, there: Path) -> str:
    """Whether what a command writes is `whole`, `absent`, `half` or `earlier`."""
    if not there.exists():
        return "absent"
    if there.is_file() and there.read_bytes() == EARLIER:
        return "earlier"
    return "whole" if canonical(there) == canonical(whole) else "half"


def canonical(place: Path) -> dict[str, Any]:
    """All files of a folder, or a file, by name; of safetensors the tensors and the metadata, whose order is random."""
    files = [place] if place.is_file() else [file for file in sorted(place.rglob("*")) if file.is_file()]
    return {str(file.relative_to(place)): content_of(file) for file in files}


def content_of(file: Path) -> Any:
    """The content of a file."""
    if file.name.endswith(".safetensors"):
        with suppress(SafetensorError), safe_open(file, "np") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 not a mapping
            return opened.metadata(), {name: (x.dtype, x.shape, x.tobytes()) for name, x in tensors.items()}
    if file.name == "manifest.json":
        with suppress(ValueError):
            manifest = json.loads(file.read_bytes())
            return {name: value for name, value in manifest.items() if name not in ("files", "sha256")}
    return file.read_bytes()
