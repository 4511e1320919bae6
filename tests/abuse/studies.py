"""Studies of strangers: files that never end, names that lead elsewhere, numbers without sense, circles."""

import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from abuse.tally import Case

from seqmix.lab.study.plan import plan
from seqmix.lab.study.study import load_study

GOOD = {"base": "retnet-tiny", "mixers": "[retention, linear_attention]"}
FIELDS = {
    "base": ("{pipe}", "/dev/zero", "{folder}", "{study}", "no-such", "''", "../../../etc/passwd", "[a]", "null", "7"),
    "extends": ("{pipe}", "/dev/zero", "{study}", "no-such.yaml"),
    "mixers": (
        "[]", "[retention, retention]", "[7]", "[null]", "[{kind: [a]}]", "['os:system']", "[{n_heads: 2}]", "x", "[x]",
    ),
    "entries": (
        "{../../up: {}}", "{'': {}}", "{a/b: {}}", "{a: 7}", "{a: {extends: '{pipe}'}}", "{a: {extends: /dev/zero}}",
        "{a: {set: {model: 7}}}", "{a: {set: {data.paths: [x]}}}", "{a: {set: {model.blocks: null}}}",
        "{a: {training: {steps: 1}}}", "{retention: {}}", "{a: {match: {parameters: .nan, knob: d_model}}}",
    ),
    "seeds": ("[]", "[-1]", "[1e400]", "[0, 0]", f"[{2**70}]", "['0']", "[0.5]", "null"),
    "tune": (
        "{learning_rate: [0, 1.0]}", "{learning_rate: [-1.0, 1.0]}", "{learning_rate: [.nan, 1.0]}",
        "{learning_rate: [1.0]}", "{learning_rate: [1.0, a]}", "{learning_rate: [0.1, 0.2], seeds: [0]}", "7",
    ),
    "equal": ("{no_such: 1}", "{short_conv: x}", "{short_conv: {a: 1}}", "{7: 1}", "[a]", f"{{short_conv: {2**80}}}"),
    "subject": ("no-such", "7", "''"),
    "vary": (
        "{seed: [1]}", "{x: [1]}", "{model.no.such: [1]}", "{model.d_model: []}", "{model.d_model: [[1], {a: 1}]}",
        "{model.d_model: [-1]}", "{data.paths: [[/dev/zero]]}", f"{{model.d_model: [{2**80}]}}",
    ),
    "match": (
        "{parameters: 1, knob: d_model}", "{parameters: no-such, knob: d_model}", "{parameters: retention, knob: '*'}",
        "{parameters: retention, knob: 'blocks.**'}", "{flops: -5, knob: d_model}", "{parameters: retention, knob: ''}",
        "{parameters: 1.0e+300, knob: d_model}", "{parameters: 1000000000000, knob: n_layers}",
    ),
    "speed": (
        "{train: {lengths: []}}", "{train: {lengths: [0]}}", f"{{decode: {{contexts: [{2**40}]}}}}", "{repeat: 1}",
    ),
    "paper": ("[{label: a, entry: no, theirs: 1}]", "[{label: '', entry: retention, theirs: 1}]"),
    "threads": ("0", "-1", "1e9", "a"),
    "name": ("../up", "''", "a/b", "con\\0", "7"),
    "training": ("{steps: 0}", "{steps: .nan}", "{patience: 3}", "{no_such: 1}"),
    "data": ("{paths: [/dev/zero]}", "{kind: no-such}", "{sequence_length: 0}"),
    "question": ("[a]",),
    "no_such": ("1",),
}  # fmt: skip
USED = {
    ("name", "7"),
    ("data", "{paths: [/dev/zero]}"),
    ("vary", "{data.paths: [[/dev/zero]]}"),
    ("entries", "{a/b: {}}"),
}
"""What may be used: a plan reads no text."""


def studies(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """A good study with one field that is not."""
    (pipe := folder / "pipe").parent.mkdir(exist_ok=True)
    os.mkfifo(pipe)
    number = 0
    for field, values in FIELDS.items():
        for value in values:
            number += 1
            file = folder / f"study{number}.yaml"
            where = {"{pipe}": str(pipe), "{folder}": str(folder), "{study}": str(file)}
            text = "".join(f"{key}: {each}\n" for key, each in (GOOD | {field: value}).items())
            for mark, place in where.items():
                text = text.replace(mark, place)
            yield Case(f"{field}: {value[:40]}", partial(_plan, file, text), refused=(field, value) not in USED)


def _plan(file: Path, text: str) -> None:
    file.write_text(text)
    plan(load_study(file), file)
