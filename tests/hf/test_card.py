"""The folder of an export: a card that says how to load it, and modeling code for trust_remote_code=True."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

TINY = ("model.d_model=16", "model.n_layers=2", "data.sequence_length=16", "training.steps=2", "training.batch_size=2")
LOAD = """
import os
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code={trust})
tokens = AutoTokenizer.from_pretrained("out")("the ", return_tensors="pt")
print(model.generate(**tokens, max_new_tokens=5, do_sample=False)[0].tolist())
model.save_pretrained("again")
"""


@pytest.fixture
def run(seqmix):
    assert seqmix("train", "retnet-tiny", *TINY, "data.paths=[text.txt]", "--out", "run").status == 0
    return "run"


def load(trust: bool) -> subprocess.CompletedProcess:
    """Load the folder in a process that does not import seqmix.hf itself."""
    code = LOAD.format(trust=trust)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_card_says_what_is_missing(seqmix, run):
    assert seqmix("export", run, "--to", "hf", "out").status == 0
    card = Path("out/README.md").read_text()
    assert "import seqmix.hf  # registers" in card
    assert "retention" in card
    assert "does not recognize" in load(trust=False).stderr


def test_modeling_code_replaces_the_import(seqmix, run, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert seqmix("export", run, "--to", "hf", "out", "--remote-code").status == 0
    assert "trust_remote_code=True" in Path("out/README.md").read_text()
    loaded = load(trust=True)
    assert loaded.returncode == 0, loaded.stderr
    generated = seqmix(
        "generate", run, "--prompt", "the ", "--max-new-tokens", "5", "--temperature", "0", "--json", "-"
    )
    assert len(eval(loaded.stdout)) == 4 + 5
    assert generated.status == 0
    assert Path("again/modeling_seqmix.py").is_file()


def test_it_is_refused_where_it_would_not_load(seqmix, run, refused):
    assert "--remote-code needs --to hf" in refused("export", run, "--out", "x.safetensors", "--remote-code")
    Path("mine_hf.py").write_text(
        "from seqmix.mixers.retention import RetentionConfig\n\n\nclass Mine(RetentionConfig):\n    pass\n"
    )
    block = "model.blocks.ret.mixer={kind: mine_hf:Mine, n_heads: 2}"
    done = seqmix("train", "retnet-tiny", *TINY, "data.paths=[text.txt]", block, "--out", "plugged")
    if done.status == 0:
        assert "cannot carry the plug-in mine_hf:Mine" in refused(
            "export", "plugged", "--to", "hf", "o", "--remote-code"
        )
        assert not Path("o").exists()
