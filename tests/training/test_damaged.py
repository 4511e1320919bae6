"""Damaged configurations, data and runs: each is refused with an error or works; none ends in a traceback.

Ten times the cases, 1,900: pytest tests/training/test_damaged.py --hypothesis-profile nightly
"""

import hashlib
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from abuse.shards import split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from seqmix import SeqmixError, load_config, load_run, train
from seqmix.data import read_documents, tokenized, write_token_file
from seqmix.models import generate_text, load_tokenizer, train_bpe
from seqmix.registry import dump
from seqmix.registry.yaml import parse, write
from seqmix.training import export_run, read_config
from seqmix.training.checkpoint.files import MANIFEST_FILE, WrittenFile, checkpoints, read_manifest

pytestmark = pytest.mark.slow


def cases(share: float) -> settings:
    """A share of the profile's cases, always the same ones, each within a minute: waiting for ever is a fault too."""
    return settings(
        max_examples=round(share * settings().max_examples),
        deadline=60_000,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


SMALL = (
    *("model.d_model=16", "model.n_layers=2", "model.dropout=0.1", "data.sequence_length=16", "training.steps=2"),
    *("training.batch_size=4", "training.warmup_steps=1", "training.evaluate_every=1", "training.log_every=1"),
    *("training.checkpoint_every=1", "training.evaluation_batches=2", "training.final_evaluation_batches=3"),
)
PRESETS = ("retnet-tiny", "hybrid-tiny", "mamba2-tiny", "hyena-tiny", "delta-net-tiny", "gla-tiny")
TEXT = "the text of a small run, over and over again. " * 60
ROOM = 2**31
"""Bytes that a case may allocate; the system refuses more, as where memory is short."""


@pytest.fixture(autouse=True)
def _little_memory_and_no_waiting_for_the_disk(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr("seqmix.training.checkpoint.files.flush", lambda path: None)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def folder(tmp_path_factory) -> Callable[[], Path]:
    """Empty folders, one per case."""
    return lambda: tmp_path_factory.mktemp("case")


def refused(action: Callable[[], object]) -> str | None:
    """The error with which an action is refused; None if it succeeds. Any other exception is a failure."""
    try:
        action()
    except SeqmixError as error:
        require_lines(str(error))
        return str(error)
    return None


def require_lines(message: str) -> None:
    """A few lines that a terminal prints and does not obey."""
    lines = message.split("\n")
    assert len(lines) <= 6
    assert all(line.strip() and line.isprintable() and len(line) < 2000 and "Traceback" not in line for line in lines)


A_FEW = st.integers(1, 4)


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """A file's content: cut short, flipped, overwritten, repeated, in another encoding, or something else."""
    for _ in range(draw(A_FEW)):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        match draw(st.sampled_from(["cut", "flip", "insert", "overwrite", "repeat", "empty", "recode"])):
            case "cut":
                content = content[:at]
            case "flip" if content:
                content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
            case "insert":
                content = content[:at] + draw(st.binary(min_size=1, max_size=9)) + content[at:]
            case "overwrite":
                junk = draw(st.binary(min_size=1, max_size=9))
                content = content[:at] + junk + content[at + len(junk) :]
            case "repeat":
                content = content[:at] + content[at // 2 :]
            case "empty":
                content = b""
            case "recode":
                encoding = draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32-be"]))
                content = content.decode(errors="replace").encode(encoding)
    return content


NUMBERS = (0, 1, 2, 3, 7, 64, -1, 2**31 - 1, 2**31, 2**63, 10**30, 0.0, 0.5, 1.0, -0.5, 1e-320, 1e308, 1e999, -1e999)
WORDS = ("", "8", "true", "null", "retention", "bytes", "auto", "retnet-tiny", "a:B", "../x", "\0", "ä\u2028", "~", "*")
JUNK = st.recursive(
    st.none() | st.booleans() | st.sampled_from((*NUMBERS, *WORDS)) | st.just(float("nan")) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every key and item."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from places(value, (*path, key))


def damage(tree: dict, draw: st.DrawFn) -> None:
    """Delete, rename, replace, move or wrap one value."""
    *way, key = draw(st.sampled_from(list(places(tree)) or [("model",)]))
    holder: Any = tree
    for part in way:
        holder = holder[part]
    what = draw(st.sampled_from(["delete", "rename", "replace", "number", "number", "wrap", "move"]))
    if what == "delete":
        del holder[key]
    elif what == "rename" and isinstance(holder, dict):
        holder[draw(st.text(max_size=6) | st.just(str(key)[:-1]) | st.just(f"{key}s"))] = holder.pop(key)
    elif what == "wrap":
        holder[key] = [holder[key]] if draw(st.booleans()) else {str(key): holder[key]}
    elif what == "number" and isinstance(holder[key], (int, float)):
        holder[key] = draw(st.sampled_from(NUMBERS).filter(lambda number: type(number) is type(holder[key])))
    elif what == "move":
        tree[draw(st.text(max_size=6))] = holder[key]
    else:
        holder[key] = draw(JUNK)


TRICKS = (
    "\n<<: *none\n",
    "\nmodel: {}\n",
    "\nseed: &a [*a]\n",
    "\n---\nseed: 1\n",
    "\nextends: run.yaml\n",
    "\nextends: retnet-tiny\n",
    "\nextends: [1]\n",
    "\nseed: !!python/object:os.system 1\n",
    "\n? {a: 1}\n: 2\n",
    "\n\tseed: 1\n",
    "\nseed: " + "[" * 3000 + "\n",
    "\nseed: " + "9" * 5000 + "\n",
    "".join(f"\nx{i}: &x{i} [*x{i - 1}, *x{i - 1}]" for i in range(1, 40)).replace("*x0", "1"),
    "\nx: &x {a: &y [1, 1]}\nz: {<<: *x, <<: *x}\n",
)


@st.composite
def damaged_configs(draw: st.DrawFn, wholes: list[str]) -> bytes:
    """A YAML file with changed values, and at times changed syntax."""
    text = draw(st.sampled_from(wholes))
    if draw(st.integers(0, 3)):
        document = parse(text, "run.yaml")
        assert document is not None
        tree = document.plain()
        for _ in range(draw(A_FEW)):
            damage(tree, draw)
        text = write(tree)
    match draw(st.sampled_from(["as it is", "as it is", "trick", "lines", "bytes"])):
        case "trick":
            text += draw(st.sampled_from(TRICKS))
        case "lines":
            lines = text.splitlines(keepends=True)
            at = draw(st.integers(0, max(len(lines) - 1, 0)))
            lines.insert(at, draw(st.sampled_from([*lines, "  x: 1\n", "- 1\n", "x\n", "'\n", "a: b: c\n"])))
            text = "".join(lines)
        case "bytes":
            return draw(damaged_bytes(text.encode()))
    return text.encode()


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def wholes(text_file) -> list[str]:
    small = [*SMALL, f"data.paths=[{text_file}]"]
    both = {"hybrid-tiny": ["model.pattern=[ret, attn]"]}
    return [dump(load_config(preset, [*small, *both.get(preset, [])])) for preset in PRESETS]


def train_two_steps(file: Path) -> None:
    asked = iter([False, True])
    list(train(load_config(file), file.parent / "run", stop=lambda: next(asked)))


@cases(0.6)
@given(data=st.data())
def test_damaged_config_is_refused_or_trains(data, wholes, folder):
    file = folder() / "run.yaml"
    file.write_bytes(data.draw(damaged_configs(wholes)))
    refused(lambda: train_two_steps(file))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """One text in every format."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "a.txt").write_text(TEXT)
    rows = [{"text": TEXT[at : at + 50], "n": at} for at in range(0, len(TEXT), 50)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config("retnet-tiny", [f"data.paths=[{folder / 'a.jsonl'}]"]).data
    pytest.importorskip("tokenizers")
    train_bpe([("a", TEXT.encode())], 300, folder / "t.json")
    for name, tokenizer in (("a", load_tokenizer("bytes")), ("b", load_tokenizer(folder / "t.json"))):
        write_token_file(folder / f"{name}.tokens", tokenized(read_documents(config), tokenizer), tokenizer)
    return folder


def damage_data(here: Path, sources: Path, draw: st.DrawFn) -> list[str]:
    """Copy all sources into a folder, and damage one of them; the changes of a run that reads it."""
    shutil.copytree(sources, here, dirs_exist_ok=True)
    names = files_of(sources)
    name = draw(st.sampled_from(names))
    victim = here / name
    match draw(st.sampled_from(["damage"] * 6 + ["missing", "folder", "link", "empty", "other", "unreadable"])):
        case "damage":
            victim.write_bytes(draw(damaged_bytes(victim.read_bytes())))
        case "missing" | "folder" as what:
            victim.unlink()
            if what == "folder":
                victim.mkdir()
        case "link":
            victim.unlink()
            victim.symlink_to(victim)
        case "empty":
            victim.write_bytes(b"")
        case "other":
            victim.write_bytes((sources / draw(st.sampled_from(names))).read_bytes())
        case "unreadable":
            victim.chmod(0)
    return [
        "model.vocab_size=400",
        f"data.paths=[{victim if name != 't.json' else here / 'a.txt'}]",
        f"data.tokenizer={here / 't.json' if name in ('b.tokens', 't.json') else 'bytes'}",
        f"data.split={draw(st.sampled_from(['auto', 'tail', 'by_document', 'by_file']))}",
        f"data.order={draw(st.sampled_from(['random_windows', 'epochs']))}",
        f"data.packing={draw(st.sampled_from(['true', 'false']))}",
    ]


@cases(0.6)
@given(data=st.data())
def test_damaged_data_is_refused_or_trains(data, sources, folder):
    here = folder()
    config = load_config("retnet-tiny", [*SMALL, *damage_data(here, sources, data.draw)])
    refused(lambda: list(train(config, here / "run")))


STEPS = 4


@pytest.fixture(scope="module")
def runs(text_file, tmp_path_factory) -> dict[str, Path]:
    """A run in the middle, the same of two processes, the same at its end, and those of another width and seed."""
    folder = tmp_path_factory.mktemp("runs")
    base = [*SMALL, f"data.paths=[{text_file}]", f"training.steps={STEPS}", "training.carry_state=true"]
    for name, changes in (("whole", ()), ("half", ()), ("other", ("model.d_model=32",)), ("twin", ("seed=1",))):
        asked = iter([name == "half" and step == 1 for step in range(STEPS)])
        list(train(load_config("retnet-tiny", [*base, *changes]), folder / name, stop=lambda asked=asked: next(asked)))
    assert len(checkpoints(folder / "half")) == 2
    split(shutil.copytree(folder / "half", folder / "sharded"))
    return {run.name: run for run in folder.iterdir()}


def files_of(run: Path) -> list[str]:
    return sorted(str(file.relative_to(run)) for file in run.rglob("*") if file.is_file())


def seal(folder: Path) -> None:
    """Make a checkpoint's manifest true to its files."""
    manifest = read_manifest(folder)
    contents = {name: (folder / name).read_bytes() for name in manifest.files if (folder / name).is_file()}
    files = {name: WrittenFile(bytes=len(x), sha256=hashlib.sha256(x).hexdigest()) for name, x in contents.items()}
    (folder / MANIFEST_FILE).write_text(manifest.seal(files).model_dump_json())


def damaged_manifest(content: bytes, draw: st.DrawFn) -> bytes:
    """A manifest with other values."""
    tree = json.loads(content)
    for _ in range(draw(A_FEW)):
        damage(tree, draw)
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def damage_run(run: Path, good: Path, runs: dict[str, Path], draw: st.DrawFn) -> bool:
    """Damage some files of a run; whether it can only go on as the uninterrupted run."""
    names, faithful = files_of(run), True
    for _ in range(draw(A_FEW)):
        name = draw(st.sampled_from(names))
        file, content = run / name, (good / name).read_bytes()
        if file.is_dir():
            continue
        faithful &= file.name != "config.yaml"
        match draw(st.sampled_from(["damage", "damage", "edit", "missing", "folder", "swap", "seal"])):
            case "damage":
                file.write_bytes(draw(damaged_bytes(content)))
            case "edit" if file.name == MANIFEST_FILE:
                file.write_bytes(damaged_manifest(content, draw))
            case "edit" if file.name == "config.yaml":
                file.write_bytes(draw(damaged_configs([content.decode()])))
            case "missing" | "folder" as what:
                file.unlink(missing_ok=True)
                if what == "folder":
                    file.mkdir()
            case "swap":
                other = runs[draw(st.sampled_from(["other", "twin"]))]
                file.write_bytes((other / draw(st.sampled_from(files_of(other)))).read_bytes())
            case "seal" if file.suffix == ".safetensors":
                file.write_bytes(draw(damaged_bytes(content)))
                faithful &= refused(lambda folder=file.parent: seal(folder)) is not None
    return faithful


@cases(0.3)
@given(data=st.data())
def test_damaged_run_is_refused_or_resumed(data, runs, folder):
    _require_refused_or_resumed(data, runs, folder, "half")


@cases(0.1)
@given(data=st.data())
def test_damaged_multi_process_run_is_refused_or_resumed(data, runs, folder):
    _require_refused_or_resumed(data, runs, folder, "sharded")


def _require_refused_or_resumed(data, runs, folder, kind):
    run = folder() / "run"
    shutil.copytree(runs[kind], run)
    faithful = damage_run(run, runs[kind], runs, data.draw)
    refused(lambda: generate_text(load_run(run, on_note=require_lines), ["a"], max_new_tokens=2))
    refused(lambda: export_run(run, run.parent / "a.safetensors", on_note=require_lines))
    refusal = refused(lambda: list(train(read_config(run), run, resume=True)))
    if faithful and refusal is None:
        name = Path("checkpoints") / f"step-{STEPS:06d}" / "model.safetensors"
        ours, theirs = load_file(run / name), load_file(runs["whole"] / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), "another run than the uninterrupted one"


@cases(0.3)
@given(data=st.data())
def test_damaged_weights_file_is_refused_or_generates(data, runs, folder):
    file = folder() / "a.safetensors"
    export_run(runs["whole"], file)
    file.write_bytes(data.draw(damaged_bytes(file.read_bytes())))
    refused(lambda: generate_text(load_run(file), ["a"], max_new_tokens=2))
