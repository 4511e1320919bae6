"""Exported folders: a model card that says how to load them, and modeling code for trust_remote_code=True."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from seqmix.training.monitoring.measurements import read_measurements

pytest.importorskip("transformers")

TINY = (
    *("model.d_model=16", "model.n_layers=2", "data.sequence_length=16", "data.paths=[text.txt]"),
    *("training.steps=2", "training.batch_size=2", "training.warmup_steps=0"),
)
LOAD = """
import json
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code={trust})
tokenizer = AutoTokenizer.from_pretrained("out")
tokens = model.generate(**tokenizer("the ", return_tensors="pt"), max_new_tokens=5, do_sample=False)[0]
print(json.dumps(tokenizer.decode(tokens, skip_special_tokens=True)))
model.save_pretrained("again")
"""
MINE = """
from typing import Literal
from seqmix.mixers.retention import RetentionConfig
class MineConfig(RetentionConfig):
    kind: Literal["mine_hf"] = "mine_hf"
"""


@pytest.fixture
def run(seqmix):
    assert seqmix("train", "retnet-tiny", *TINY, "--out", "run").status == 0
    return "run"


def load(*, trust: bool) -> subprocess.CompletedProcess:
    """Load the folder in a process that does not import seqmix.interop.hf itself."""
    code = LOAD.format(trust=trust)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_model_card_names_the_required_import(seqmix, run):
    assert seqmix("export", run, "--to", "hf", "out").status == 0
    card = Path("out/README.md").read_text()
    assert "import seqmix.interop.hf  # registers" in card
    assert "with these mixers: retention." in card
    assert "does not recognize" in load(trust=False).stderr


def test_model_card_describes_the_training(seqmix, run):
    assert seqmix("export", run, "--to", "hf", "out").status == 0
    card = Path("out/README.md").read_text()
    assert "| data | text.txt |" in card
    assert "| tokens | 64: 2 of 2 steps, each of 2 sequences of 16 tokens |" in card
    (measured,) = (line for line in read_measurements(Path(run)) if line.get("final"))
    assert f"| validation loss | {measured['validation_loss']:.4f} nats per token |" in card


def test_model_card_of_ema_weights_omits_the_validation_loss(seqmix):
    assert seqmix("train", "retnet-tiny", *TINY, "training.ema=0.5", "--out", "run").status == 0
    assert seqmix("export", "run", "--to", "hf", "out", "--ema").status == 0
    card = Path("out/README.md").read_text()
    assert "| weights | moving average with decay 0.5 |" in card
    assert "validation loss" not in card


def test_model_card_of_an_exported_file_omits_the_training(seqmix, run):
    assert seqmix("export", run, "--out", "model.safetensors").status == 0
    assert seqmix("export", "model.safetensors", "--to", "hf", "out").status == 0
    assert "Training" not in Path("out/README.md").read_text()


def test_remote_code_export_loads_without_importing_seqmix_hf(seqmix, run, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    assert seqmix("export", run, "--to", "hf", "out", "--remote-code").status == 0
    assert "trust_remote_code=True" in Path("out/README.md").read_text()
    loaded = load(trust=True)
    assert loaded.returncode == 0, loaded.stderr
    greedy = ("--max-new-tokens", "5", "--temperature", "0", "--json", "-")
    (text,) = json.loads(seqmix("generate", run, "--prompt", "the ", *greedy).out)["texts"]
    assert json.loads(loaded.stdout) == text["prompt"] + text["continuation"]
    assert Path("again/modeling_seqmix.py").is_file()


def test_remote_code_export_is_rejected_if_it_would_not_load(seqmix, run, refused):
    assert "--remote-code needs --to hf" in refused("export", run, "--out", "x.safetensors", "--remote-code")
    Path("mine_hf.py").write_text(MINE)
    block = "model.blocks.ret.mixer={kind: mine_hf:MineConfig, n_heads: 2}"
    done = seqmix("train", "retnet-tiny", *TINY, block, "--out", "plugged")
    assert done.status == 0, done.err
    sentence = refused("export", "plugged", "--to", "hf", "folder", "--remote-code")
    assert "cannot carry the plug-in mine_hf:MineConfig" in sentence
    assert not Path("folder").exists()
    assert seqmix("export", "plugged", "--to", "hf", "folder").status == 0
    assert "The model needs `mine_hf`" in Path("folder/README.md").read_text()
