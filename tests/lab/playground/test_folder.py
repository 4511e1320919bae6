"""`seqmix playground` rejects bad input by name before it writes anything."""

import pytest
from small_runs import refusal, run_of

from seqmix import load_config
from seqmix.interop.onnx.export import PACKAGES
from seqmix.lab.playground import write_playground
from seqmix.lab.playground.tokenizers import require_page_tokenizer
from seqmix.models.subword import SubwordTokenizer

SMALL = [
    "model.d_model=16",
    "model.n_layers=1",
    "training={steps: 1, batch_size: 1, warmup_steps: 0, evaluation_batches: 1, final_evaluation_batches: 1}",
]


@pytest.fixture
def packages():
    for package in PACKAGES:
        pytest.importorskip(package, reason="pip install 'seqmix[onnx]'")


def test_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "file.txt").touch()
    message = refusal(lambda: write_playground([tmp_path / "nothing"], tmp_path))
    assert str(tmp_path) in message
    assert "choose a new name" in message
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_duplicate_run_is_rejected(packages, tmp_path):
    runs = [tmp_path / "run", tmp_path / "other" / ".." / "run"]
    assert "named twice" in refusal(lambda: write_playground(runs, tmp_path / "out"))


def test_run_trained_on_a_task_is_rejected_before_export(packages, tmp_path):
    run_of(load_config("mqar-tiny", [*SMALL]), tmp_path / "recall")
    begun: list[bool] = []
    message = refusal(
        lambda: write_playground([tmp_path / "recall"], tmp_path / "out", on_start=lambda: begun.append(True))
    )
    assert not begun  # the command says that it exports only when it does
    assert "recall was trained on a task" in message
    assert not (tmp_path / "out").exists()


LOOP = """
from dataclasses import replace
from typing import Literal
from seqmix.mixers.linear_attention import LinearAttentionConfig

class LoopConfig(LinearAttentionConfig):
    kind: Literal["loop"] = "loop"

    @property
    def traits(self):
        return replace(super().traits, compiles=False)
"""


def test_mixer_without_onnx_export_is_rejected(packages, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "text.txt").write_text("some text to learn\n" * 40)
    (tmp_path / "loop_mixer.py").write_text(LOOP)
    block = "{mixer: {kind: loop_mixer:LoopConfig, n_heads: 2}, ffn: {kind: mlp}, norm: {kind: layernorm}}"
    data = f"data={{paths: [{tmp_path / 'text.txt'}], split: tail, sequence_length: 16}}"
    run_of(load_config("retnet-tiny", [*SMALL, data, f"model.blocks.ret={block}"]), tmp_path / "looped")
    monkeypatch.setattr("seqmix.lab.playground.folder.export_onnx", None)  # nothing is exported before the refusal
    message = refusal(lambda: write_playground([tmp_path / "looped"], tmp_path / "out"))
    assert "looped: " in message
    assert "loop" in message
    assert not (tmp_path / "out").exists()


def test_unsupported_tokenizers_are_rejected():
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    spaced = tokenizers.Tokenizer(tokenizers.models.BPE())
    spaced.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    spaced.decoder = tokenizers.decoders.ByteLevel()
    special = tokenizers.Tokenizer.from_str(spaced.to_str())
    special.add_special_tokens(["<end>"])
    for library, part in ((words, "WordLevel"), (spaced, "add_prefix_space"), (special, "<end>")):
        tokenizer = SubwordTokenizer(library.to_str().encode(), "tokenizer.json")
        message = refusal(lambda tokenizer=tokenizer: require_page_tokenizer(tokenizer, "runs/mine"))
        assert part in message
        assert "runs/mine" in message
