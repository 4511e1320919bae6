"""A stranger's files: nothing that they name or hold is executed.

Every program and module here leaves a canary where it is executed. The module that a run's configuration names is
imported, as the documentation says, and is named before.
"""

import json
import os
import pickle
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from abuse.commands import SMALL
from abuse.shards import seal
from abuse.tally import Case
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seqmix import build_model, load_config, load_run, train
from seqmix.interop.convert import import_from
from seqmix.lab.study.run_results import is_same
from seqmix.lab.study.study import load_study
from seqmix.training import export_run, load_prompt_cache
from seqmix.training.checkpoint.files import checkpoints
from seqmix.training.checkpoint.saved_run import EXPORTED_CONFIG, read_weights
from seqmix.training.tensor_files import CHECKSUM_KEY

PATHS = ("stranger:Config", "étranger:Config", "stranger.part:Config", "antigravity:x", "os:system", "os:system.x")
PATHS += ("stranger:", ":stranger", " stranger:Config", "stranger:Config:Config", "stranger", "../stranger:Config")
SPELT = ("stranger:Config", "'stranger:Config'", '"stranger:Config"', '"\\x73tranger:Config"', "!!str stranger:Config")
SPELT += ("étranger:Config", "&a stranger:Config", "stranger.part:Config", "stranger:Config # a comment")
TAGS = ("python/object/apply:os.system ['{0}']", "python/module:stranger ''", "python/name:stranger.Config ''")
TAGS += ("python/object/new:os.system ['{0}']", "python/object:stranger.Config {{}}", "stranger x", "python/tuple [a]")
PICKLES = ("model.safetensors", "pytorch_model.bin", "a.tokens", "a.npy", "a.parquet", "tokenizer.json", "a.pt")


def trust(folder: Path, drawn: random.Random) -> Iterator[Case]:
    """Exports, weights and runs that name modules, YAML with tags, and pickles."""
    base, canary, program = folder / "base", folder / "canary", folder / "program"
    for package in (base, base / "stranger"):
        package.mkdir()
    (base / "text.txt").write_text("the text of a small run, over and over again. " * 60)
    program.write_text(f"#!/bin/sh\ntouch '{canary}'\ncat\n")
    program.chmod(0o755)
    for module in ("stranger/__init__", "stranger/part", "étranger"):
        code = f"open({str(canary)!r}, 'w').close()\nfrom seqmix.mixers.retention import RetentionConfig as Config\n"
        (base / f"{module}.py").write_text(code)

    def case(name: str, action: Callable[[], object], refused: bool = True) -> Case:
        return Case(name, partial(_watched, base, canary, program, action), refused)

    list(train(config := load_config("retnet-tiny", [*SMALL, f"data.paths=[{base / 'text.txt'}]"]), base / "run"))
    export_run(base / "run", good := base / "good.safetensors")
    with safe_open(good, "pt") as opened:
        tensors, metadata = load_file(good), opened.metadata()
    del metadata[CHECKSUM_KEY]
    for number, (kind, path) in enumerate(product(("retention", "mlp", "layernorm", "text"), PATHS)):
        (other := base / f"{number}").mkdir()
        named = metadata[EXPORTED_CONFIG].replace(f'"kind":"{kind}"', f'"kind":{json.dumps(path)}')
        save_file(tensors, file := other / "model.safetensors", metadata | {EXPORTED_CONFIG: named})
        (other / "config.json").write_text(json.dumps({"model": json.loads(named)["model"], "auto_map": path}))
        for use in (load_run, read_weights):
            yield case(f"{use.__name__}, {kind} is {path}", partial(use, file), refused=kind != "text")
        for start in (file, other):
            document = base / f"{number}-{start.name}.yaml"
            document.write_text(f"training: {{steps: 1, start_from: {start}}}")
            yield case(f"start from {start.name}, {kind} is {path}", partial(load_config, document), kind != "text")
        if find_spec("transformers") is not None:
            hf = {"model": json.loads(named)["model"], "model_type": "seqmix"}
            (folder_of_hf := base / f"hf{number}").mkdir()
            (folder_of_hf / "config.json").write_text(json.dumps(hf | {"auto_map": {"AutoConfig": "stranger.Config"}}))
            save_file(
                {f"model.{name}": x for name, x in tensors.items()},
                folder_of_hf / "model.safetensors",
                {"format": "pt"},
            )
            for trusts in (None, False):
                load = partial(_from_hugging_face, folder_of_hf, trusts)
                yield case(f"Hugging Face, {kind} is {path}, trust_remote_code={trusts}", load, refused=kind != "text")
        yield case(
            f"metadata of a checkpoint, {kind} is {path}", partial(_open_sealed, base, number, named), kind != "text"
        )
        study = partial(_planned_before, base / "run", base / f"study{number}", kind, path)
        yield case(f"a folder of a study, {kind} is {path}", study, refused=False)
        yield case(f"convert, {kind} is {path}", partial(import_from, other, None))
    for number, spelt in enumerate(SPELT):
        yield case(f"a run of {spelt}", partial(_open, base, base / f"run{number}", spelt, canary), refused=False)
    for number, (load, tag) in enumerate(product((load_config, load_study), TAGS)):
        (file := base / f"tag{number}.yaml").write_text(f"model: !!{tag.format(program)}")
        yield case(f"{load.__name__} of !!{tag}", partial(load, file))
        yield case(f"a change to !!{tag}", partial(load_config, "retnet-tiny", [f"seed=!!{tag.format(program)}"]))
    model = build_model(config.model)
    for name in PICKLES:
        (other := base / f"pickle-{name}").mkdir()
        (file := other / name).write_bytes(pickle.dumps(_Bomb(str(program))))
        reads = {"a run": load_run, "YAML": load_config, "a prompt cache": partial(load_prompt_cache, model=model)}
        for what, read in reads.items():
            yield case(f"{what} that is a pickle, {name}", partial(read, file))
        yield case(f"a folder with a pickle, {name}", partial(import_from, other, None))
        for key in ("paths", "tokenizer"):
            change = f"data={{{key}: {[str(file)] if key == 'paths' else file}}}"
            yield case(f"{key} that are a pickle, {name}", lambda c=change: load_config("retnet-tiny", [c]).open_data())


class _Bomb:
    def __init__(self, program: str) -> None:
        self.program = program

    def __reduce__(self) -> tuple:
        return os.system, (f"'{self.program}' < /dev/null",)


def _watched(base: Path, canary: Path, program: Path, action: Callable[[], object]) -> None:
    """Do it in the stranger's folder; the canary must not be there after it."""
    path, modules = list(sys.path), set(sys.modules)
    try:
        with chdir(base), patch.dict(os.environ, BROWSER=str(program)):
            action()
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if "tranger" in name or name == "antigravity":
                del sys.modules[name]
        there = canary.exists()
        canary.unlink(missing_ok=True)
        if there:
            raise AssertionError("it was executed")


def _from_hugging_face(folder: Path, trusts: bool | None) -> None:
    import transformers

    import seqmix.interop.hf  # noqa: F401

    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trusts)
    transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusts)


def _open_sealed(base: Path, number: int, named: str) -> None:
    """A run whose configuration names nothing, and whose checkpoint's metadata does."""
    run = base / f"sealed{number}"
    shutil.copytree(base / "run", run)
    folder = checkpoints(run)[-1]
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata | {"seqmix.model": json.dumps(json.loads(named)["model"])})
    seal(folder)
    load_run(run)


def _planned_before(run: Path, folder: Path, kind: str, path: str) -> None:
    """A study finds a folder where it is to write a run."""
    config = load_config(run / "config.yaml")
    shutil.copytree(run, folder)
    file = folder / "config.yaml"
    file.write_text(file.read_text().replace(f"kind: {kind}", f"kind: {json.dumps(path)}"))
    is_same(SimpleNamespace(config=config), folder)


def _open(base: Path, run: Path, spelt: str, canary: Path) -> None:
    """A run names the module that it imports before it does."""
    shutil.copytree(base / "run", run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("kind: retention", f"kind: {spelt}"))
    sentences: list[str] = []
    load_run(run, on_note=lambda said: sentences.append(f"{said}{', after' * canary.exists()}"))
    assert canary.exists(), "its module is not imported"
    canary.unlink()
    assert len(sentences) == 1, sentences
    assert re.search(r" imports the module .tranger(.part)?$", sentences[0]), sentences
