"""A run read back, and its weights in one file."""

import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from seqmix import SeqmixError, build_model, load_run, train
from seqmix.models import ByteTokenizer
from seqmix.training import CheckpointError, RunConfig, export_run, read_config
from seqmix.training.checkpoint import checkpoints


@pytest.fixture
def run(config_of, tmp_path):
    every = ("training.evaluate_every=100", "training.checkpoint_every=2", "training.keep_checkpoints=9")
    list(train(config_of(*every, "model.tie_embeddings=true"), tmp_path / "run"))
    return tmp_path / "run"


def weights(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def refusal(action) -> str:
    with pytest.raises(CheckpointError) as raised:
        action()
    assert isinstance(raised.value, SeqmixError)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_any_checkpoint_is_read(run):
    for folder, choice in zip(checkpoints(run), (2, 4, 6), strict=True):
        assert same(weights(load_run(run, choice=choice)), load_file(folder / "model.safetensors"))
    assert same(weights(load_run(run)), weights(load_run(run, choice=6)))
    assert same(weights(load_run(run, choice="best")), weights(load_run(run, choice=6)))
    assert not same(weights(load_run(run)), weights(load_run(run, choice=4)))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_read(run):
    file = checkpoints(run)[-1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    told = []
    model = load_run(run, tell=told.append)
    assert same(weights(model), load_file(checkpoints(run)[-2] / "model.safetensors"))
    (note,) = told
    assert note.startswith(f"{file} is damaged: it has ")
    assert note.endswith("; passed over")
    with pytest.warns(UserWarning, match="is damaged"):
        load_run(run)


def test_damaged_moments_do_not_matter(run):
    (checkpoints(run)[-1] / "optimizer.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_run(run)
    assert same(weights(model), load_file(checkpoints(run)[-1] / "model.safetensors"))


# ---- one file


def test_a_file_has_weights_and_configuration(run, tmp_path):
    file = tmp_path / "folder" / "model.safetensors"
    assert export_run(run, file, choice=4) == 4
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert (metadata["format"], metadata["seqmix.step"]) == ("pt", "4")
    assert RunConfig.model_validate(json.loads(metadata["seqmix.config"])) == read_config(run)
    model = load_run(file)
    assert not model.training
    assert model.config == read_config(run).model
    assert same(weights(model), weights(load_run(run, choice=4)))
    assert model.head.weight is model.embedding.weight
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_vocabulary_goes_with_the_weights(run, tmp_path, monkeypatch):
    class Vocabulary(ByteTokenizer):
        def __init__(self, vocabulary: bytes, name: str) -> None:
            del name
            self.vocabulary = vocabulary

    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("tokenizer: bytes", "tokenizer: own"))
    (run / "tokenizer.json").write_text('{"of": "the run, ä"}', encoding="utf-8")
    for module in ("training.saved_run", "models.subword"):
        monkeypatch.setattr(f"seqmix.{module}.SubwordTokenizer", Vocabulary)
    export_run(run, tmp_path / "model.safetensors")
    (run / "tokenizer.json").unlink()
    assert load_run(tmp_path / "model.safetensors").tokenizer.vocabulary.decode() == '{"of": "the run, ä"}'


def test_how_it_was_trained_may_be_of_another_version(run, tmp_path):
    export_run(run, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    config = json.loads(read_config(run).model_dump_json()) | {"training": {"of": "another time"}}
    save_file(tensors, tmp_path / "b.safetensors", {"seqmix.config": json.dumps(config)})
    assert same(weights(load_run(tmp_path / "b.safetensors")), tensors)


def test_nothing_is_overwritten(run, tmp_path):
    (tmp_path / "mine").write_text("mine")
    assert "exists already" in refusal(lambda: export_run(run, tmp_path / "mine"))
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_file_that_cannot_be_written_is_one_sentence(run, tmp_path):
    (tmp_path / "file").touch()
    message = refusal(lambda: export_run(run, tmp_path / "file" / "model.safetensors"))
    assert message.startswith(f"{tmp_path / 'file' / 'model.safetensors'} cannot be written: ")


FOREIGN = {
    "no safetensors": (lambda file, tensors: file.write_text("weights"), "is damaged or no safetensors file"),
    "no configuration": (lambda file, tensors: save_file(tensors, file), "needs a file of `seqmix export`"),
    "a configuration of something else": (
        lambda file, tensors: save_file(tensors, file, {"seqmix.config": '{"model": {"layers": 3}}'}),
        "has a configuration that cannot be used",
    ),
    "a configuration that is none": (
        lambda file, tensors: save_file(tensors, file, {"seqmix.config": "[3]"}),
        "has a configuration that cannot be used",
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_something_else_is_one_sentence(config_of, tmp_path, kind):
    make, sentence = FOREIGN[kind]
    file = tmp_path / "model.safetensors"
    make(file, weights(build_model(config_of().model)))
    message = refusal(lambda: load_run(file))
    assert message.startswith(str(file))
    assert sentence in message


def test_weights_of_another_model_are_one_sentence(run, tmp_path):
    file = tmp_path / "model.safetensors"
    export_run(run, file)
    tensors = load_file(file)
    del tensors["norm.weight"]
    save_file(tensors, file, {"seqmix.config": read_config(run).model_dump_json()})
    assert refusal(lambda: load_run(file)) == f"{file} is of another model: it lacks norm.weight"
