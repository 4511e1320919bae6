"""Every command that writes, and the folder that it runs in."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SMALL = (
    *("model.d_model=16", "model.n_layers=1", "data.sequence_length=16", "training.steps=2", "training.batch_size=2"),
    *("training.evaluation_batches=1", "training.final_evaluation_batches=1", "training.checkpoint_every=1"),
    *("training.log_every=1", "data.paths=[text.txt]"),
)
TINY = ("retnet-tiny", "model.d_model=16", "model.n_layers=1", "--length", "16", "--tokens", "16")
LLAMA = (
    "model={norm: {kind: rmsnorm}, blocks: {attn: {mixer: {kind: attention, n_heads: 4, positions: rope}, "
    "ffn: {kind: swiglu, expansion: 2.0}, norm: {kind: rmsnorm}}}}"
)
"""A model that transformers has too."""
STUDY = """
base: retnet-tiny
mixers: [retention]
model: {d_model: 16, n_layers: 1}
data: {sequence_length: 16, paths: [text.txt]}
training: {steps: 2, batch_size: 2, evaluation_batches: 1, final_evaluation_batches: 1, log_every: 1}
"""


def commands() -> dict[str, list[str]]:
    """Command lines by what they write, in a folder of `prepared`; what needs a library that is missing is left out."""
    found = {
        "train": ["train", "retnet-tiny", *SMALL, "--out", "new"],
        "resume": ["train", "--resume", "run"],
        "tokenize": ["tokenize", "text.txt", "--out", "new.tokens"],
        "tokenizer": ["tokenize", "text.txt", "--train-bpe", "300", "--out", "new.tokens"],
        "save-state": ["generate", "run", "--prompt", "a", "--max-new-tokens", "2", "--save-state", "new.state"],
        "evaluate": ["evaluate", "run", "--length", "16", "--tokens", "16", "--json", "new.json"],
        "plot": ["plot", "run", "--out", "new.html"],
        "plot-png": ["plot", "run", "--figure", "loss", "--out", "new.png"],
        "export": ["export", "run", "--out", "new.safetensors"],
        "average": ["average", "run", "new"],
        "compare": ["compare", "study.yaml", "--out", "new"],
        "bench": ["bench", "train", *TINY, "--only", "seqmix", "--json", "new.json", "--markdown", "new.md"],
        "convert": ["convert", "theirs", "--tokenizer", "bytes", "--to", "new"],
        "convert-as": ["convert", "llama", "--as", "llama", "--to", "new"],
        "export-hf": ["export", "llama", "--to", "hf", "new"],
        "inspect": ["inspect", "llama", "--text", "text.txt", "--out", "new.html", "--json", "new.json"],
        "check": ["check", "min_gru", "--quick", "--compile", "none", "--json", "new.json", "--junit", "new.xml"],
    }
    return {name: line for name, line in found.items() if "hf" not in line or find_spec("transformers") is not None}


def prepared(folder: Path) -> Path:
    """A folder with text.txt, a run that is not done, a Llama of ours and of transformers, and a study's file."""
    base = folder / "base"
    base.mkdir()
    (base / "text.txt").write_text("the text of a small run, over and over again. " * 60)
    (base / "study.yaml").write_text(STUDY)
    call(base, ["train", "retnet-tiny", *SMALL, "--out", "run"])
    config = base / "run" / "config.yaml"  # which may be edited: it is not done yet
    config.write_text(config.read_text().replace("  steps: 2\n", "  steps: 3\n"))
    call(base, ["train", "attention-tiny", *SMALL, LLAMA, "--out", "llama"])
    call(base, ["convert", "llama", "--as", "llama", "--to", "theirs"])
    return base


def call(where: Path, arguments: list[str]) -> None:
    """Run a command that must succeed."""
    subprocess.run(
        [sys.executable, "-m", "seqmix", *arguments],
        cwd=where,
        capture_output=True,
        env=environment(),
        timeout=200,
        check=True,
    )


def environment() -> dict[str, str]:
    """What commands run in: a wide terminal, and no bytecode beside a text."""
    return os.environ | {"COLUMNS": "200", "PYTHONDONTWRITEBYTECODE": "1"}
