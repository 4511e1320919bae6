"""Loading a saved run, and exporting its weights to one file."""

import json
import random
import re
import warnings
from hashlib import sha256

import pytest
import torch
from abuse.shards import seal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import refusal, run_of

from seqmix import ConfigError, build_model, load_run
from seqmix.models import ByteTokenizer, train_bpe
from seqmix.training import CheckpointError, RunConfig, export_run, read_config
from seqmix.training.checkpoint import files as checkpoint
from seqmix.training.checkpoint import train_state
from seqmix.training.checkpoint.averaging import average_run
from seqmix.training.checkpoint.files import checkpoints
from seqmix.training.checkpoint.saved_run import read_weights
from seqmix.training.tensor_files import CHECKSUM_KEY


@pytest.fixture
def run(config_of, tmp_path):
    every = ("training.evaluate_every=100", "training.checkpoint_every=2", "training.keep_checkpoints=9")
    run_of(config_of(*every, "model.tie_embeddings=true"), tmp_path / "run")
    return tmp_path / "run"


def weights(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def metadata_of(file) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def refused(action) -> str:
    return refusal(action, CheckpointError)


def test_load_run_reads_any_checkpoint(run):
    for folder, choice in zip(checkpoints(run), (2, 4, 6), strict=True):
        assert same(weights(load_run(run, choice=choice)), load_file(folder / "model.safetensors"))
    assert same(weights(load_run(run)), weights(load_run(run, choice=6)))
    assert same(weights(load_run(run, choice="best")), weights(load_run(run, choice=6)))
    assert not same(weights(load_run(run)), weights(load_run(run, choice=4)))
    assert 'did you mean "best"' in refused(lambda: load_run(run, choice="bset"))


def test_load_run_skips_damaged_parameters_and_ignores_missing_moments(run):
    (checkpoints(run)[-1] / "optimizer.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(weights(load_run(run)), load_file(checkpoints(run)[-1] / "model.safetensors"))
    file, notes = checkpoints(run)[-1] / "model.safetensors", []
    file.write_bytes(file.read_bytes()[:-1])
    assert same(weights(load_run(run, on_note=notes.append)), load_file(checkpoints(run)[-2] / "model.safetensors"))
    (note,) = notes
    assert note.startswith(f"{file} is damaged")
    with pytest.warns(UserWarning, match="is damaged"):
        load_run(run)


@pytest.mark.parametrize("function", ["verify", "read_chunks"])
def test_load_run_falls_back_when_a_checkpoint_is_deleted_meanwhile(run, monkeypatch, function):
    """Delete a checkpoint before its checksums are verified, or before its weights are read, as a training run may."""
    module = checkpoint if function == "verify" else train_state
    whole, newest, waiting = getattr(module, function), checkpoints(run)[-1], [True]

    def deleting(*args):
        if waiting:
            waiting.clear()
            newest.rename(newest.with_name("step-000008.gone"))
        return whole(*args)

    monkeypatch.setattr(module, function, deleting)
    assert same(weights(load_run(run)), load_file(checkpoints(run)[-1] / "model.safetensors"))
    newest.with_name("step-000008.gone").rename(newest)
    waiting.append(True)
    assert re.search("checkpoint of step 6; it has .* 2, 4$", refused(lambda: load_run(run, choice=6)))


def test_exported_file_contains_weights_and_config(run, tmp_path):
    file = tmp_path / "folder" / "model.safetensors"
    assert export_run(run, file, choice=4) == 4
    metadata = metadata_of(file)
    assert (metadata["format"], metadata["seqmix.step"]) == ("pt", "4")
    assert RunConfig.model_validate(json.loads(metadata["seqmix.config"])) == read_config(run)
    model = load_run(file)
    assert (model.training, model.config) == (False, read_config(run).model)
    assert same(weights(model), weights(load_run(run, choice=4)))
    assert model.head.weight is model.embedding.weight
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_exported_file_contains_the_vocabulary(run, tmp_path, monkeypatch):
    class Vocabulary(ByteTokenizer):
        def __init__(self, vocabulary: bytes, name: str, begin: None) -> None:
            del name, begin
            self.vocabulary = vocabulary

    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("tokenizer: bytes", "tokenizer: own"))
    (run / "tokenizer.json").write_text('{"of": "the run, ä"}', encoding="utf-8")
    for module in ("training.checkpoint.saved_run", "models.subword"):
        monkeypatch.setattr(f"seqmix.{module}.SubwordTokenizer", Vocabulary)
    export_run(run, tmp_path / "model.safetensors")
    (run / "tokenizer.json").unlink()
    assert load_run(tmp_path / "model.safetensors").tokenizer.vocabulary.decode() == '{"of": "the run, ä"}'


def test_export_to_existing_or_unwritable_path_is_refused(run, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for file in (tmp_path / "mine", tmp_path / "mine" / "model.safetensors"):
        assert refused(lambda file=file: export_run(run, file)).startswith(f"{file} ")
    assert (tmp_path / "mine").read_text() == "mine"


def test_export_with_unknown_training_fields_loads(run, tmp_path):
    file = tmp_path / "model.safetensors"
    export_run(run, file)
    tensors, config = load_file(file), read_config(run).model_dump_json()
    older = json.dumps(json.loads(config) | {"training": {"of": "another time"}})
    save_file(tensors, file, {"seqmix.config": older})
    assert same(weights(load_run(file)), tensors)
    # and weights of another model are refused
    del tensors["norm.weight"]
    save_file(tensors, file, {"seqmix.config": config})
    message = refused(lambda: load_run(file))
    assert message.startswith(f"{file} ")
    assert message.endswith("norm.weight")


FOREIGN = {
    "not safetensors": lambda file, tensors: file.write_text("weights"),
    "no configuration": lambda file, tensors: save_file(tensors, file),
    "another configuration": lambda file, x: save_file(x, file, {"seqmix.config": '{"model": {"layers": 3}}'}),
    "not a configuration": lambda file, tensors: save_file(tensors, file, {"seqmix.config": "[3]"}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_file_that_is_not_an_export_is_named(config_of, tmp_path, kind):
    file = tmp_path / "model.safetensors"
    FOREIGN[kind](file, weights(build_model(config_of().model)))
    assert refused(lambda: load_run(file)).startswith(f"{file} ")


def test_export_imports_a_module_only_with_trust(run, tmp_path, monkeypatch):
    export_run(run, file := tmp_path / "model.safetensors")
    tensors, config = load_file(file), json.loads(read_config(run).model_dump_json())
    config["model"]["blocks"]["ret"]["mixer"]["kind"] = "strangers_module:Config"
    save_file(tensors, file, {"seqmix.config": json.dumps(config)})
    (tmp_path / "strangers_module.py").write_text(
        "from seqmix.mixers.retention import RetentionConfig as Config\nfrom pathlib import Path\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "strangers_module:Config" in refusal(lambda: load_run(file), ConfigError)
    assert not (tmp_path / "ran").exists()
    assert same(weights(load_run(file, trust=True)), tensors)


def test_loading_weights_of_another_dtype_is_noted(run, tmp_path):
    file = tmp_path / "a.safetensors"
    export_run(run, file)
    metadata = metadata_of(file)
    del metadata[CHECKSUM_KEY]
    notes: list[str] = []
    load_run(file, on_note=notes.append)
    assert notes == []
    save_file({name: x.half() for name, x in load_file(file).items()}, file, metadata)
    load_run(file, on_note=notes.append)
    assert len(notes) == 1
    assert "float16" in notes[0]
    assert "float32" in notes[0]


def test_changed_tokenizer_is_refused(config_of, text, tmp_path):
    documents = [("a text", text.read_bytes())]
    train_bpe(documents, 300, own := tmp_path / "own.json")
    run_of(config_of(f"data.tokenizer={own}", "model.vocab_size=300"), run := tmp_path / "run")
    good = (run / "tokenizer.json").read_bytes()
    other = good.replace(b'"t":', b'"@@":').replace(b'"h":', b'"t":').replace(b'"@@":', b'"h":')  # two letters
    assert len(other) == len(good)
    assert other != good
    (run / "tokenizer.json").write_bytes(other)
    for use in (
        lambda: load_run(run),
        lambda: export_run(run, tmp_path / "a.safetensors"),
        lambda: read_weights(run),
        lambda: average_run(run, tmp_path / "mean", checkpoints=2),
        lambda: run_of(config_of(f"data.tokenizer={own}", "model.vocab_size=300"), run, resume=True),
    ):
        message = refused(use)
        assert "expected a tokenizer.json with SHA-256 " + sha256(good).hexdigest() in message
        assert message.endswith("put the file of the training back")
    (run / "tokenizer.json").write_bytes(good)
    average_run(run, tmp_path / "mean", checkpoints=2)
    assert load_run(tmp_path / "mean").tokenizer.vocabulary == good
    # a checkpoint of an older version has no hash
    folder = checkpoints(run)[-1]
    tensors, metadata = load_file(folder / "model.safetensors"), metadata_of(folder / "model.safetensors")
    del metadata[train_state.TOKENIZER_KEY]
    save_file(tensors, folder / "model.safetensors", metadata)
    seal(folder)
    (run / "tokenizer.json").write_bytes(other)
    assert load_run(run).tokenizer.vocabulary == other


def test_export_with_one_flipped_bit_is_refused(run, tmp_path):
    export_run(run, file := tmp_path / "a.safetensors")
    whole = file.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    drawn = random.Random(0)
    for place in drawn.sample(range(begin, len(whole)), 20):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << drawn.randrange(8)]) + whole[place + 1 :])
        assert refused(lambda: load_run(file)).startswith(f"{file} is damaged: its checksum does not match")
    file.write_bytes(whole.replace(b'"seqmix.step":"6"', b'"seqmix.step":"7"'))  # and in the metadata
    assert "its checksum does not match" in refused(lambda: load_run(file))


def test_export_without_a_checksum_loads(run, tmp_path):
    export_run(run, file := tmp_path / "a.safetensors")
    metadata = metadata_of(file)
    del metadata[CHECKSUM_KEY]
    save_file(tensors := load_file(file), file, metadata)
    assert same(weights(load_run(file)), tensors)
