"""Runs that store copies of their plugins: when a copy is imported, trusted, or found to differ."""

import sys
from pathlib import Path

import pytest
from conftest import SMALL

from seqmix import load_config
from seqmix.registry import plug_in_sources
from seqmix.training.checkpoint.code import CODE, has_same_code, read_code

MIXER = """
from typing import Literal

import helper
from seqmix.mixers.parts import QKVConfig, QKVMixer
from seqmix.ops.decay import decay


class AverageConfig(QKVConfig):
    kind: Literal["average_here"] = "average_here"

    def build(self, d_model, *, layer_idx, n_layers):
        return Average(self, d_model)


class Average(QKVMixer):
    log_decay_shape = "B T H"

    def recur(self, x, h, call):
        return decay(h.q, h.k, h.v, helper.SCALE * h.k.new_ones(h.k.shape[:-1]), call)
"""
TEXT = "data.paths=[text.txt]"
BLOCK = "model.blocks.ret.mixer={kind: average_here:AverageConfig, n_heads: 2}"


@pytest.fixture
def elsewhere(seqmix, monkeypatch, tmp_path):
    """A run of a mixer in a file, and a function that forgets its modules and goes to another folder."""
    monkeypatch.setattr(plug_in_sources, "_LOADER", plug_in_sources._CarriedLoader())
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    Path("average_here.py").write_text(MIXER)
    Path("helper.py").write_text("SCALE = -0.5\n")
    done = seqmix("train", "retnet-tiny", *SMALL, TEXT, BLOCK, "--out", "run")
    assert done.status == 0, done.err

    def go(folder: str = "other") -> Path:
        forget()
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "text.txt").write_bytes((tmp_path / "text.txt").read_bytes())
        monkeypatch.chdir(tmp_path / folder)
        return tmp_path / "run"

    yield go
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("average_here", "helper", "run")]:
        del sys.modules[name]


def generate(seqmix, run, *options):
    return seqmix("generate", run, "--prompt", "the ", "--max-new-tokens", "8", *options)


def test_run_stores_copies_of_its_plugin_and_its_imports(elsewhere):
    assert read_code(Path("run")) == {"average_here.py": MIXER.encode(), "helper.py": b"SCALE = -0.5\n"}
    sums = Path("run", CODE, "SHA256SUMS").read_text().splitlines()
    assert [line.split("  ")[1] for line in sums] == ["average_here.py", "helper.py"]
    assert len(sums[0].split("  ")[0]) == 64


def test_unchanged_plugin_is_imported_without_trust(elsewhere, seqmix):
    elsewhere(".")
    assert generate(seqmix, "run").err == "note: run imports the module average_here\n"


def test_plugin_copy_is_imported_only_with_trust(elsewhere, seqmix, refused):
    here = generate(seqmix, "run")
    run = elsewhere()
    message = refused("generate", run, "--prompt", "a")
    digest = plug_in_sources.sha256(MIXER.encode())
    assert f"{run}/code/average_here.py (sha256 {digest})" in message
    assert "--trust" in message
    assert "average_here" not in sys.modules
    done = generate(seqmix, run, "--trust")
    assert (done.status, done.out) == (0, here.out)
    assert digest in done.err
    assert sys.modules["helper"].__file__ == f"{run}/code/helper.py"
    for command in (("evaluate", run, "--length", "16"), ("average", run, "mean"), ("train", "--resume", run)):
        assert seqmix(*command, "--trust").status == 0
    assert read_code(Path("mean")) == read_code(run)


def test_changed_plugin_is_noted(elsewhere, seqmix):
    before = generate(seqmix, "run").out
    Path("helper.py").write_text("SCALE = -5.0\n")
    elsewhere(".")
    done = generate(seqmix, "run")
    assert "the module helper differs from the copy in run/code" in done.err
    assert done.out != before
    elsewhere(".")
    assert generate(seqmix, "run", "--trust").out == before


def test_export_includes_the_plugin(elsewhere, seqmix, refused):
    here = generate(seqmix, "run").out
    assert seqmix("export", "run", "--out", "run.safetensors").status == 0
    elsewhere()
    assert "--trust" in refused("generate", "../run.safetensors", "--prompt", "a")
    assert generate(seqmix, "../run.safetensors", "--trust").out == here


def test_differing_plugin_copies_cannot_be_loaded_together(elsewhere, seqmix, refused):
    Path("helper.py").write_text("SCALE = -5.0\n")
    forget()
    assert seqmix("train", "retnet-tiny", *SMALL, TEXT, BLOCK, "--out", "second").status == 0
    run = elsewhere()
    done = seqmix("evaluate", run, run.with_name("second"), "--length", "16", "--trust")
    assert done.status == 2
    assert "load the two in separate processes" in done.err


def test_has_same_code_detects_a_changed_plugin_import(elsewhere):
    config = load_config("run/config.yaml")
    assert has_same_code(Path("run"), config)
    Path("helper.py").write_text("SCALE = -5.0\n")
    assert not has_same_code(Path("run"), config)


def test_code_paths_outside_the_folder_are_not_read(tmp_path):
    (tmp_path / CODE).mkdir()
    (tmp_path / "secret.py").write_text("")
    (tmp_path / CODE / "SHA256SUMS").write_text("0  ../secret.py\n0  /etc/passwd\n")
    assert read_code(tmp_path) == {}


@pytest.mark.parametrize("way", ["inside", "link to the folder", "links to the files", "PYTHONPATH"])
def test_plugin_copies_on_sys_path_are_not_imported_without_trust(way, elsewhere, refused, tmp_path, monkeypatch):
    run = elsewhere()
    here = {"inside": run / CODE, "link to the folder": tmp_path / "link"}.get(way, tmp_path / "other")
    (tmp_path / "link").symlink_to(run / CODE)
    if way == "links to the files":
        for name in ("average_here.py", "helper.py"):
            Path(name).symlink_to(run / CODE / name)
    if way == "PYTHONPATH":
        monkeypatch.syspath_prepend(run / CODE)
    monkeypatch.chdir(here)
    message = refused("generate", run, "--prompt", "a")
    assert f"{run}/code/average_here.py (sha256 {plug_in_sources.sha256(MIXER.encode())})" in message
    assert "--trust" in message
    assert "average_here" not in sys.modules


@pytest.mark.parametrize("trust", [[], ["--trust"]])
@pytest.mark.parametrize("name", ["stranger", "run.code.stranger", "run.stranger"])
def test_unlisted_files_in_a_run_are_never_imported(name, trust, elsewhere, seqmix, tmp_path, monkeypatch):
    run = elsewhere()
    for folder in (run, run / CODE):
        (folder / "stranger.py").write_text("open('executed', 'w').close()\n" + MIXER)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("average_here:", f"{name}:"))
    monkeypatch.chdir(run / CODE if name == "stranger" else tmp_path)
    done = seqmix("generate", run, "--prompt", "a", *trust)
    assert done.status == 2
    assert "run/config.yaml" in done.err
    assert f"{name} is a file of a run" in done.err
    assert not Path("executed").exists()
