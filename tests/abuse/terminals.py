"""What a stranger's names and texts do to a terminal: they are shown, and never obeyed.

A pseudo-terminal stands for the terminal. Commands may colour what they say, hide the cursor and redraw a line; nothing
else that a terminal obeys may arrive: no title, no cleared screen, no bell, no character of the upper control range.
Options are not among the cases: who types one is no stranger.
"""

import json
import os
import pty
import random
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from abuse.commands import SMALL, call, environment, prepared
from abuse.tally import Case

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b2J\x7f\u202e"
"""Sets the title, rings, clears the screen twice, deletes, and turns the direction of writing."""
ALLOWED = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[[012]?K|\x1b\[[0-9]*[AG]|[\r\n\t]")
"""Colours, the cursor hidden and shown, lines cleared, the cursor moved up and to a column."""
OBEYED = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def terminals(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Names of files, folders, keys and entries, texts and tokens, by every way to the terminal."""
    base = prepared(folder)
    for number, (name, arrange) in enumerate(CASES.items()):
        yield Case(name, partial(_try, base, folder / str(number), arrange), refused=False)


def _try(base: Path, where: Path, arrange: Callable[[Path], list[str]]) -> None:
    shutil.copytree(base, where)
    shown = _on_a_terminal(where, arrange(where))
    assert shown.strip(), "nothing is shown"
    assert "Traceback" not in shown, shown[-200:]
    obeyed = OBEYED.findall(ALLOWED.sub("", shown))
    assert not obeyed, f"{sorted(set(obeyed))} in {shown[:200]!r}"


def _on_a_terminal(where: Path, arguments: list[str]) -> str:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "seqmix", *arguments]
    settings = environment() | {"TERM": "xterm-256color"}
    running = subprocess.Popen(command, cwd=where, stdin=theirs, stdout=theirs, stderr=theirs, env=settings)
    os.close(theirs)
    shown, end = b"", time.monotonic() + 200
    try:
        while time.monotonic() < end:
            if select.select([ours], [], [], 1)[0]:
                try:
                    shown += os.read(ours, 2**16)
                except OSError:  # the terminal's last process has ended
                    break
        else:
            raise TimeoutError(f"{arguments} does not end")
    finally:
        running.kill()
        running.wait()
        os.close(ours)
    return shown.decode(errors="replace")


# ---- what a command meets, each in a folder of its own


def _moved(where: Path, of: str, to: str) -> str:
    (where / of).rename(where / to)
    return to


def _written(where: Path, name: str, text: str) -> str:
    (where / name).write_text(text)
    return name


def _edited(where: Path, name: str, old: str, new: str) -> str:
    file = where / name
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    return name


def _study(where: Path, text: str) -> list[str]:
    return ["compare", _edited(where, "study.yaml", "base: retnet-tiny", f"base: retnet-tiny\n{text}")]


def _exported(where: Path, note: str) -> str:
    """An export whose metadata has the text, as a stranger may write it."""
    call(where, ["export", "run", "--out", "a.safetensors"])
    data = (where / "a.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict.fromkeys(header["__metadata__"], note)
    written = json.dumps(header).encode()
    (where / "a.safetensors").write_bytes(len(written).to_bytes(8, "little") + written + data[8 + length :])
    return "a.safetensors"


def _measured(where: Path, line: dict[str, object]) -> list[str]:
    with (where / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return ["plot", "run", "--out", "a.html"]


TRAIN = ["train", "retnet-tiny", *SMALL]
QUOTED = json.dumps(EVIL)
FILE = EVIL.replace("/", "") + ".txt"
CASES: dict[str, Callable[[Path], list[str]]] = {
    "a new run's folder": lambda w: [*TRAIN, "--out", EVIL],
    "a folder of it": lambda w: [*TRAIN, "--out", f"{EVIL}/run"],
    "a run's folder": lambda w: ["generate", _moved(w, "run", EVIL), "--prompt", "a", "--max-new-tokens", "3"],
    "a run that goes on": lambda w: ["train", "--resume", _moved(w, "run", EVIL)],
    "a run that is exported": lambda w: ["export", _moved(w, "run", EVIL), "--out", f"{EVIL}.safetensors"],
    "a run that is drawn": lambda w: ["plot", _moved(w, "run", EVIL), "--out", f"{EVIL}.html"],
    "a run that is judged": lambda w: ["evaluate", _moved(w, "run", EVIL), "--length", "16", "--tokens", "16"],
    "a run that is averaged": lambda w: ["average", _moved(w, "run", EVIL), f"{EVIL}2"],
    "a run that is looked into": lambda w: [
        "inspect", _moved(w, "llama", EVIL), "--text", "text.txt", "--out", "a.html"
    ],
    "no run": lambda w: ["generate", EVIL, "--prompt", "a"],
    "a text's name": lambda w: [*TRAIN, f"data.paths=[{json.dumps(_moved(w, 'text.txt', FILE))}]"],
    "no text": lambda w: [*TRAIN, f"data.paths=[{QUOTED}]"],
    "a text without documents": lambda w: [*TRAIN, f"data.paths=[{json.dumps(_written(w, FILE, ''))}]"],
    "a text to tokenize": lambda w: ["tokenize", _moved(w, "text.txt", FILE), "--out", f"{EVIL}.tokens"],
    "no text to tokenize": lambda w: ["tokenize", EVIL, "--out", "a.tokens"],
    "a text that is not JSON": lambda w: ["tokenize", _written(w, "a.jsonl", f'{{"text": {EVIL}'), "--out", "a.tokens"],
    "a field of JSON lines": lambda w: [
        "tokenize", _written(w, "a.jsonl", json.dumps({EVIL: "a"})), "--out", "a.tokens"
    ],
    "a prompt": lambda w: ["generate", "run", "--prompt", EVIL, "--max-new-tokens", "3"],
    "a text of a model": lambda w: [
        "generate", "run", "--prompt", "a", "--max-new-tokens", "3000", "--temperature", "9", "--no-compile"
    ],
    "a preset": lambda w: ["show", EVIL],
    "a key": lambda w: ["show", "retnet-tiny", f"{EVIL}=1"],
    "a value": lambda w: ["show", "retnet-tiny", f"model.d_model={QUOTED}"],
    "a key in a file": lambda w: ["show", _written(w, "a.yaml", f"extends: retnet-tiny\n{QUOTED}: 1\n")],
    "a value in a file": lambda w: ["show", _written(w, "a.yaml", f"extends: {QUOTED}\n")],
    "a comment in a file": lambda w: ["show", _written(w, "a.yaml", f"extends: retnet-tiny # {EVIL}\n")],
    "a name of a block": lambda w: [
        "show", _written(w, "a.yaml", f"extends: retnet-tiny\nmodel: {{pattern: [{QUOTED}]}}\n")
    ],
    "a path that is shown": lambda w: ["show", "retnet-tiny", f"data.paths=[{QUOTED}]"],
    "a mixer": lambda w: ["show", "retnet-tiny", f"model.blocks.ret.mixer.kind={QUOTED}"],
    "a dotted path": lambda w: ["show", "retnet-tiny", f'model.blocks.ret.mixer.kind="{EVIL}:{EVIL}"'],
    "a mixer to check": lambda w: ["check", EVIL],
    "a check": lambda w: ["check", "min_gru", "--only", EVIL],
    "a study's question": lambda w: [*_study(w, f"question: {QUOTED}"), "--dry-run"],
    "a study's name": lambda w: [*_study(w, f"name: {QUOTED}"), "--dry-run"],
    "a study's entry": lambda w: [*_study(w, f"entries: {{{QUOTED}: {{}}}}"), "--dry-run"],
    "a study's mixer": lambda w: [*_study(w, f"entries: {{a: {{set: {{{QUOTED}: 1}}}}}}"), "--dry-run"],
    "a study that runs": lambda w: [*_study(w, f"question: {QUOTED}"), "--out", EVIL],
    "no study": lambda w: ["compare", EVIL],
    "a suite's mixer": lambda w: ["suite", EVIL, "--dry-run"],
    "a suite's task": lambda w: ["suite", "--tasks", EVIL, "--dry-run"],
    "an export's notes": lambda w: ["generate", _exported(w, EVIL), "--prompt", "a", "--max-new-tokens", "3"],
    "an export that goes on": lambda w: [*TRAIN, f"training.start_from={_exported(w, EVIL)}"],
    "a measurement's name": lambda w: _measured(w, {"step": 3, EVIL: 1}),
    "a measurement's text": lambda w: _measured(w, {"step": 3, "loss": EVIL, "kind": EVIL}),
    "a damaged configuration": lambda w: [
        "generate", _edited(w, "run/config.yaml", "model:", f"{QUOTED}: 1\nmodel:").partition("/")[0], "--prompt", "a"
    ],
    "a command": lambda w: [EVIL],
    "a saved state": lambda w: [
        "generate", "run", "--prompt", "a", "--max-new-tokens", "2", "--save-state", f"{EVIL}.state"
    ],
    "no saved state": lambda w: ["generate", "run", "--prompt", "a", "--state", EVIL],
    "a plan": lambda w: ["plan", EVIL, "--gpus", "2"],
    "a model to convert": lambda w: ["convert", _moved(w, "theirs", EVIL), "--tokenizer", "bytes", "--to", f"{EVIL}2"],
    "what it is converted to": lambda w: ["convert", "llama", "--as", EVIL, "--to", "a"],
    "a folder of evil": lambda w: ["train", "retnet-tiny", *SMALL, f"--out={EVIL}\n{EVIL}"],
}  # fmt: skip
