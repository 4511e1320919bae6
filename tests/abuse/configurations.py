"""Configurations and studies that are small to write and large to read: they end within seconds, or say why not."""

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from abuse.tally import Case

from seqmix import load_config
from seqmix.data import TextConfig, read_documents
from seqmix.lab.study.plan import plan
from seqmix.lab.study.study import load_study

DEEP = 10**5
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], y{i}: 1}}\n" for i in range(1, 40))
NUMBERS = ("1" + "0" * 400, "9" * 5000, "1e400", "-1e400", ".inf", ".nan", "0x" + "f" * 300, "0o7", "1:30", "1e-400")
TEXTS = {
    "aliases": BOMB,
    "merges": MERGES,
    "brackets": "model: " + "[" * DEEP,
    "braces": "model: " + "{a: " * DEEP,
    "dashes": "- " * DEEP,
    "indents": "\n".join(f"{' ' * i}a:" for i in range(3000)),
    "a long key": f"{'k' * 10**6}: 1",
    "many keys": "\n".join(f"k{i}: 1" for i in range(50_000)),
    "many anchors": "\n".join(f"k{i}: &a{i} 1" for i in range(20_000)),
    "an alias of itself": "model: &a {b: *a}",
    "no alias": "model: *none",
    "a tag": "model: !!python/object/apply:os.system [ls]",
    "a binary": "model: !!binary aGVsbG8=",
    "a set": "model: !!set {a, b}",
    "documents": "---\na: 1\n" * 1000,
    "control characters": "model: \x00\x1b[2J",
    "a surrogate": "model: '\\ud800'",
    "quotes": "model: '" + "''" * 10**5,
    "a folded text": "model: >\n" + " x\n" * 10**5,
    "a directive": "%YAML 9.9\n---\na: 1",
    "a complex key": "? [a, b]\n: 1",
    "tabs": "model:\n\t a: 1",
}
GLOBS = (
    "**/**/**/**/**/*.txt",
    "/**/*",
    "../../../**/**/**/*",
    "[" * 1000,
    "*" * 5000,
    "",
    "\x00",
    "**/" * 50,
    "{a,b}",
)


def configurations(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """YAML that expands, nests or overflows; globs of everything; studies of a million runs."""
    for number, (name, text) in enumerate(TEXTS.items()):
        yield Case(name, partial(_load, folder / f"{number}.yaml", text))
        yield Case(f"{name} on the command line", partial(load_config, "retnet-tiny", [f"model.blocks={text}"]))
    for number, value in enumerate(NUMBERS):
        for key in ("seed", "model.d_model", "training.steps", "training.learning_rate", "data.sequence_length"):
            yield Case(f"{key} = {value[:12]}", partial(load_config, "retnet-tiny", [f"{key}={value}"]), refused=False)
        keys = f"  d_model: {value}\n  n_layers: {value}\n  vocab_size: {value}\n"
        yield Case(
            f"a model of {value[:12]}",
            partial(_load, folder / f"n{number}.yaml", f"extends: retnet-tiny\nmodel:\n{keys}"),
        )
    crowd = folder / "crowd"
    crowd.mkdir()
    (crowd / "a.txt").write_text("the text " * 100)
    for glob in GLOBS:
        yield Case(f"glob {glob[:20]!r}", partial(_read, crowd, glob), refused=False)
    for sizes in ((10, 10, 100), (100, 100, 100), (10**4,), (99_000,), (2,) * 40):
        yield Case(f"a study of {sizes if len(sizes) < 5 else 'two of forty fields'}", partial(_plan, folder, sizes))


def _load(file: Path, text: str) -> None:
    file.write_text(text, errors="surrogatepass")
    load_config(file)


def _read(folder: Path, glob: str) -> None:
    config = load_config("retnet-tiny", [f"data={json.dumps({'paths': [str(folder)], 'glob': glob})}"]).data
    assert isinstance(config, TextConfig)
    list(read_documents(config))


def _plan(folder: Path, sizes: tuple[int, ...]) -> None:
    varied = [f"  data.field{i}: [{', '.join(map(str, range(size)))}]" for i, size in enumerate(sizes)]
    file = folder / f"study-{len(sizes)}-{sizes[0]}.yaml"
    file.write_text("base: retnet-tiny\nmixers: [retention, gla]\nvary:\n" + "\n".join(varied) + "\n")
    plan(load_study(file), file)
