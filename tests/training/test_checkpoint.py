"""Checkpoints: whole or not there, and refused in one sentence where they are not this model's."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import seqmix.training.checkpoint
from seqmix import SeqmixError, build_model, load_run, train
from seqmix.training import CheckpointError, read_config
from seqmix.training.checkpoint import checkpoints, latest, load_model, load_optimizer, save, step_of
from seqmix.training.optim import build_optimizer

FILES = ("model.safetensors", "optimizer.safetensors")


def run_of(config, run: Path, **options) -> list:
    return list(train(config, run, **options))


def contents(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture
def trained(config_of, tmp_path):
    """A model and an optimizer with moments."""
    model = build_model(config_of().model)
    optimizer = build_optimizer(model, config_of().training)
    for step in range(3):
        model(torch.tensor([[step, 1, 2, 3]])).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


# ---- what is written


def test_a_checkpoint_holds_parameters_and_moments(trained, tmp_path):
    model, optimizer = trained
    folder = save(tmp_path, 7, model, optimizer, keep=2)
    assert folder == tmp_path / "checkpoints" / "step-000007"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    parameters, moments = (load_file(folder / file) for file in FILES)
    assert parameters.keys() == dict(model.named_parameters()).keys()
    assert len(moments) == 3 * len(parameters)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameters[name], parameter)
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(moments[f"{key}.{name}"], value)
    with safe_open(folder / FILES[0], "pt") as file:
        assert file.metadata()["seqmix.step"] == "7"


def test_a_checkpoint_comes_back_to_the_bit(trained, config_of, tmp_path):
    model, optimizer = trained
    folder = save(tmp_path, 7, model, optimizer, keep=2)
    other = build_model(config_of().model, seed=1)
    its = build_optimizer(other, config_of().training)
    load_model(folder, other)
    load_optimizer(folder, other, its)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert optimizer.state[mine].keys() == its.state[theirs].keys()
        for key, value in optimizer.state[mine].items():
            assert torch.equal(its.state[theirs][key], value)
            assert its.state[theirs][key].dtype is value.dtype


def test_tied_embeddings_are_written_once_and_stay_tied(config_of, tmp_path):
    run_of(config_of("model.tie_embeddings=true"), tmp_path / "run")
    assert "head.weight" not in load_file(latest(tmp_path / "run") / FILES[0])
    model = load_run(tmp_path / "run")
    assert model.head.weight is model.embedding.weight
    run_of(config_of("model.tie_embeddings=true"), tmp_path / "run", resume=True)


def test_nothing_is_pickled(config_of, tmp_path):
    run_of(config_of(), tmp_path / "run")
    assert {file.suffix for file in (tmp_path / "run").rglob("*") if file.is_file()} == {
        ".yaml",
        ".jsonl",
        ".safetensors",
    }


# ---- which are kept


def test_the_newest_are_kept(config_of, tmp_path):
    run_of(config_of("training.checkpoint_every=1", "training.keep_checkpoints=3"), tmp_path / "run")
    assert names(tmp_path / "run") == ["step-000004", "step-000005", "step-000006"]


def test_the_newest_is_by_number(trained, tmp_path):
    for step in (999_999, 1_000_001, 5):
        save(tmp_path, step, *trained, keep=9)
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [5, 999_999, 1_000_001]
    assert step_of(latest(tmp_path)) == 1_000_001


def test_a_checkpoint_of_the_same_step_is_replaced(trained, tmp_path):
    save(tmp_path, 5, *trained, keep=2)
    model, optimizer = trained
    with torch.no_grad():
        model.embedding.weight.zero_()
    folder = save(tmp_path, 5, model, optimizer, keep=2)
    assert not load_file(folder / FILES[0])["embedding.weight"].any()
    assert names(tmp_path) == ["step-000005"]


# ---- atomic


@pytest.mark.parametrize("failing", [1, 2])
def test_a_crash_while_writing_leaves_the_one_before(config_of, tmp_path, monkeypatch, failing):
    config = config_of("training.checkpoint_every=2")
    run_of(config, tmp_path / "whole")
    calls = []

    def crash(tensors, file, metadata=None):
        calls.append(file)
        if len(calls) == 2 + failing:  # in the second checkpoint
            Path(file).write_bytes(b"half of a fi")
            raise OSError(28, "No space left on device")
        save_file(tensors, file, metadata)

    monkeypatch.setattr(seqmix.training.checkpoint, "save_file", crash)
    with pytest.raises(OSError, match="No space left"):
        run_of(config, tmp_path / "run")
    monkeypatch.setattr(seqmix.training.checkpoint, "save_file", save_file)

    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-000002"]
    assert load_run(tmp_path / "run")
    started, *_ = run_of(config, tmp_path / "run", resume=True)
    assert started.step == 2
    assert names(tmp_path / "run") == ["step-000004", "step-000006"]  # and nothing of the half one
    for step in names(tmp_path / "run"):
        for file in FILES:
            mine, whole = (load_file(tmp_path / name / "checkpoints" / step / file) for name in ("run", "whole"))
            assert mine.keys() == whole.keys()
            assert all(torch.equal(mine[name], whole[name]) for name in mine)


def test_a_checkpoint_appears_with_both_files(trained, tmp_path, monkeypatch):
    seen = []

    def watch(tensors, file, metadata=None):
        seen.append(checkpoints(tmp_path))
        save_file(tensors, file, metadata)

    monkeypatch.setattr(seqmix.training.checkpoint, "save_file", watch)
    save(tmp_path, 1, *trained, keep=1)
    assert seen == [[], []]
    assert len(checkpoints(tmp_path)) == 1


def test_old_ones_are_dropped_after_the_new_one_is_there(trained, tmp_path, monkeypatch):
    save(tmp_path, 1, *trained, keep=1)
    present = []
    rmtree = shutil.rmtree

    def watch(path, *args, **kwargs):
        if Path(path).name == "step-000001":
            present.append([folder.name for folder in checkpoints(tmp_path)])
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(seqmix.training.checkpoint.shutil, "rmtree", watch)
    save(tmp_path, 2, *trained, keep=1)
    assert present == [["step-000001", "step-000002"]]
    assert names(tmp_path) == ["step-000002"]


# ---- what cannot be used


def refusal(action) -> str:
    with pytest.raises(CheckpointError) as raised:
        action()
    assert isinstance(raised.value, SeqmixError)
    assert "\n" not in str(raised.value)
    return str(raised.value)


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "cut in its header": lambda data: data[:20],
    "empty": lambda data: b"",
    "garbage": lambda data: b"garbage" * 100,
    "a header of garbage": lambda data: data[:8] + b"\xff" * (len(data) - 8),
    "with something behind it": lambda data: data + b"more",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_one_sentence(config_of, tmp_path, file, damage):
    run_of(config_of(), tmp_path / "run", stop=lambda: True)
    path = latest(tmp_path / "run") / file
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    before = contents(tmp_path / "run")
    message = refusal(lambda: run_of(config_of(), tmp_path / "run", resume=True))
    assert message.startswith(f"{path} is damaged or no safetensors file: ")
    assert contents(tmp_path / "run") == before
    if file == FILES[0]:
        assert refusal(lambda: load_run(tmp_path / "run")).startswith(f"{path} is damaged")
    else:
        assert load_run(tmp_path / "run")  # generation needs no moments


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_one_sentence(config_of, tmp_path, file):
    run_of(config_of(), tmp_path / "run", stop=lambda: True)
    path = latest(tmp_path / "run") / file
    path.unlink()
    assert refusal(lambda: run_of(config_of(), tmp_path / "run", resume=True)) == f"{path} does not exist"


FOREIGN = {
    "wider": (["model.d_model=32"], "is of another model: its embedding.weight is [257, 32], and [257, 16] is needed"),
    "deeper": (["model.n_layers=3"], "is of another model: it has blocks.2."),
    "shallower": (["model.n_layers=1"], "is of another model: it lacks blocks.1."),
    "of another mixer": (
        ["model.blocks.ret.mixer={kind: attention, n_heads: 2}"],
        "is of another model: its blocks.0.",
    ),
    "with one parameter more": (
        ["model.blocks.ret.norm={kind: layernorm, bias: true}"],
        "is of another model: it has blocks.0.ffn_norm.bias, which this one has not (and 3 more)",
    ),
}


@pytest.mark.parametrize("other", FOREIGN)
def test_a_foreign_checkpoint_is_one_sentence_and_changes_nothing(config_of, tmp_path, other):
    overrides, sentence = FOREIGN[other]
    run_of(config_of(*overrides), tmp_path / "other", stop=lambda: True)
    folder = latest(tmp_path / "other")
    model = build_model(config_of().model)
    before = [parameter.clone() for parameter in model.parameters()]
    message = refusal(lambda: load_model(folder, model))
    assert message.startswith(f"{folder / FILES[0]} was trained with another model than the configuration beside it")
    # as another program would write it: without a word on the model
    save_file(load_file(folder / FILES[0]), folder / FILES[0])
    assert f"{folder / FILES[0]} {sentence}" in refusal(lambda: load_model(folder, model))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer = build_optimizer(model, config_of().training)
    assert f"{folder / FILES[1]} is of another model" in refusal(lambda: load_optimizer(folder, model, optimizer))


@pytest.mark.parametrize(
    "override",
    [
        "model.blocks.ret.mixer.decay=geometric",
        "model.blocks.ret.norm.eps=1.0e-3",
        "model.blocks.ret.ffn.activation=relu",
    ],
)
def test_a_model_of_the_same_shapes_that_is_another_function_is_refused(config_of, tmp_path, override):
    run_of(config_of(), tmp_path / "run", stop=lambda: True)
    folder = latest(tmp_path / "run")
    message = refusal(lambda: load_model(folder, build_model(config_of(override).model)))
    assert "another model than the configuration beside it" in message


def test_what_is_no_checkpoint_is_passed_over(trained, tmp_path):
    save(tmp_path, 3, *trained, keep=2)
    (tmp_path / "checkpoints" / "step-best").mkdir()
    (tmp_path / "checkpoints" / "step-000009").write_text("a file")
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000003"]


def test_moments_alone_may_be_foreign(config_of, tmp_path):
    run_of(config_of("model.d_model=32"), tmp_path / "other", stop=lambda: True)
    run_of(config_of(), tmp_path / "run", stop=lambda: True)
    shutil.copy(latest(tmp_path / "other") / FILES[1], latest(tmp_path / "run"))
    message = refusal(lambda: run_of(config_of(), tmp_path / "run", resume=True))
    assert "optimizer.safetensors is of another model: its exp_avg.embedding.weight is [257, 32]" in message


def test_a_run_without_a_checkpoint_is_one_sentence(config_of, tmp_path):
    next(iter(train(config_of(), tmp_path / "run")))
    assert refusal(lambda: load_run(tmp_path / "run")) == f"{tmp_path / 'run'} holds no checkpoint"


@pytest.mark.parametrize(
    ("make", "what"), [(None, "does not exist"), (Path.mkdir, "holds no config.yaml"), (Path.touch, "is a file")]
)
def test_a_folder_that_is_no_run_is_one_sentence(tmp_path, make, what):
    if make:
        make(tmp_path / "run")
    message = refusal(lambda: read_config(tmp_path / "run"))
    assert message.startswith(f"{tmp_path / 'run'} is no run: it {what}")
    assert "seqmix train" in message


def test_a_configuration_that_is_no_longer_valid_is_one_sentence(config_of, tmp_path):
    run_of(config_of(), tmp_path / "run", stop=lambda: True)
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("n_layers", "n_layer"))
    with pytest.raises(SeqmixError, match=r"config\.yaml:\d+: model\.n_layer: unknown key 'n_layer'"):
        load_run(tmp_path / "run")
