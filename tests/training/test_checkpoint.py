"""Checkpoints: whole or not there, and refused in one sentence where they are not this model's."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import seqmix.training.checkpoint
from seqmix import SeqmixError, build_model, load_run, train
from seqmix.training import CheckpointError, read_config
from seqmix.training.checkpoint import (
    Best,
    Manifest,
    Writer,
    checkpoints,
    drop_others,
    drop_unfinished,
    find,
    step_of,
    verify,
    write,
)
from seqmix.training.optim import build_optimizer
from seqmix.training.train_state import gather, load_model, load_optimizer, load_state, metadata_of

FILES = ("model.safetensors", "optimizer.safetensors")


def run_of(config, run: Path, **options) -> list:
    return list(train(config, run, **options))


def contents(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def latest(run: Path) -> Path:
    return checkpoints(run)[-1]


def manifest_of(step: int, **fields) -> Manifest:
    return Manifest(**{"step": step, "seqmix": "1", "torch": "2", "threads": 1, "metrics": {}, "best": Best()} | fields)


def saved(run: Path, step: int, model, optimizer, **fields) -> Path:
    """Write a checkpoint of these."""
    return write(run, manifest_of(step, **fields), gather(model, optimizer, None), metadata_of(model.config, step))


@pytest.fixture
def trained(config_of, tmp_path):
    """A model and an optimizer with moments."""
    return trained_of(config_of())


def trained_of(config):
    model = build_model(config.model)
    optimizer = build_optimizer(model, config.training)
    for step in range(3):
        model(torch.tensor([[step, 1, 2, 3]])).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


# ---- what is written


def test_a_checkpoint_holds_parameters_and_moments(trained, tmp_path):
    model, optimizer = trained
    folder = saved(tmp_path, 7, model, optimizer)
    assert folder == tmp_path / "checkpoints" / "step-000007"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", *FILES]
    parameters, moments = (load_file(folder / file) for file in FILES)
    assert parameters.keys() == dict(model.named_parameters()).keys()
    assert len(moments) == 3 * len(parameters)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameters[name], parameter)
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(moments[f"{key}.{name}"], value)
    with safe_open(folder / FILES[0], "pt") as file:
        assert file.metadata()["seqmix.step"] == "7"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_comes_back_to_the_bit(config_of, tmp_path, optimizer):
    config = config_of(f"training.optimizer={optimizer}")
    model, optimizer = trained_of(config)
    folder = saved(tmp_path, 7, model, optimizer)
    other = build_model(config.model, seed=1)
    its = build_optimizer(other, config.training)
    load_model(folder, other)
    load_optimizer(folder, other, its)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert optimizer.state[mine].keys() == its.state[theirs].keys()
        assert any(value.any() for value in its.state[theirs].values())
        for key, value in optimizer.state[mine].items():
            assert torch.equal(its.state[theirs][key], value)
            assert its.state[theirs][key].dtype is value.dtype


def test_a_parameter_without_a_gradient_is_no_hindrance(config_of, tmp_path):
    config = config_of()
    model = build_model(config.model)
    model.head.weight.requires_grad_(False)
    optimizer = build_optimizer(model, config.training)
    model(torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
    optimizer.step()
    folder = saved(tmp_path, 7, model, optimizer)
    load_optimizer(folder, model, build_optimizer(model, config.training))


def test_tied_embeddings_are_written_once_and_stay_tied(config_of, tmp_path):
    run_of(config_of("model.tie_embeddings=true"), tmp_path / "run")
    assert "head.weight" not in load_file(latest(tmp_path / "run") / FILES[0])
    model = load_run(tmp_path / "run")
    assert model.head.weight is model.embedding.weight
    run_of(config_of("model.tie_embeddings=true"), tmp_path / "run", resume=True)


def test_nothing_is_pickled(config_of, tmp_path):
    run_of(config_of("training.carry_state=true"), tmp_path / "run")
    assert {file.suffix for file in (tmp_path / "run").rglob("*") if file.is_file()} == {
        ".yaml",
        ".json",
        ".jsonl",
        ".safetensors",
    }


@pytest.mark.slow
def test_torch_s_distributed_checkpoint_reads_it(trained, tmp_path):
    """What one process has written, many can go on from."""
    import torch.distributed.checkpoint as dcp

    model, optimizer = trained
    folder = saved(tmp_path, 7, model, optimizer)
    parts = gather(model, optimizer, None)
    wanted = {name: torch.zeros_like(x) for tensors in parts.values() for name, x in tensors.items()}
    dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    for tensors in parts.values():
        for name, tensor in tensors.items():
            assert torch.equal(wanted[name], tensor)


# ---- which are kept


def test_the_newest_are_kept(config_of, tmp_path):
    every = ("training.checkpoint_every=1", "training.keep_checkpoints=3", "training.keep_best=false")
    run_of(config_of(*every), tmp_path / "run")
    assert names(tmp_path / "run") == ["step-000004", "step-000005", "step-000006"]


def test_the_newest_is_by_number(trained, tmp_path):
    for step in (999_999, 1_000_001, 5):
        saved(tmp_path, step, *trained)
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [5, 999_999, 1_000_001]
    assert find(tmp_path).folder == checkpoints(tmp_path)[-1]


def test_the_best_is_kept_beside_the_newest(trained, tmp_path):
    for step, loss in enumerate((3.0, 1.0, 2.0, 1.0, None), start=1):
        saved(tmp_path, step, *trained, metrics={} if loss is None else {"validation_loss": loss})
    drop_others(tmp_path, 5, keep=2, keep_best=True)
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005"]  # of equal ones, the first
    drop_others(tmp_path, 5, keep=1, keep_best=False)
    assert names(tmp_path) == ["step-000005"]


def test_what_lies_behind_the_step_is_of_an_undone_past(trained, tmp_path):
    for step in (2, 4, 6, 3):
        saved(tmp_path, step, *trained)
    drop_others(tmp_path, 3, keep=2, keep_best=False)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_a_checkpoint_of_the_same_step_is_replaced(trained, tmp_path):
    saved(tmp_path, 5, *trained)
    model, optimizer = trained
    with torch.no_grad():
        model.embedding.weight.zero_()
    folder = saved(tmp_path, 5, model, optimizer)
    assert not load_file(folder / FILES[0])["embedding.weight"].any()
    assert names(tmp_path) == ["step-000005"]


# ---- atomic


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_to_write_is_one_sentence_and_leaves_the_one_before(config_of, tmp_path, monkeypatch, failing):
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
    message = refusal(lambda: run_of(config, tmp_path / "run"))
    assert message.startswith(
        f"the checkpoint {tmp_path / 'run' / 'checkpoints' / 'step-000004'} could not be written: "
    )
    assert message.endswith("No space left on device")
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


def test_a_checkpoint_appears_with_all_its_files(trained, tmp_path, monkeypatch):
    seen, written = [], []

    def watch(path):
        seen.append((path.name, len(checkpoints(tmp_path))))
        written.append(path.stat().st_ino)

    monkeypatch.setattr(seqmix.training.checkpoint, "flush", watch)
    folder = saved(tmp_path, 1, *trained)
    # all files and the folder are on the disk before it has its name, and then the name
    assert sorted(seen[:-1]) == [(name, 0) for name in (".step-000001.partial", "manifest.json", *FILES)]
    assert seen[-1] == ("checkpoints", 1)
    assert folder.stat().st_ino in written  # renamed, not copied


def test_old_ones_are_dropped_after_the_new_one_is_there(trained, tmp_path, monkeypatch):
    model, optimizer = trained
    saved(tmp_path, 1, model, optimizer)
    present = []
    rmtree = shutil.rmtree

    def watch(path, *args, **kwargs):
        if Path(path).name == ".step-000001.dropped" and Path(path).exists():
            present.append([folder.name for folder in checkpoints(tmp_path)])
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(seqmix.training.checkpoint.shutil, "rmtree", watch)
    with Writer(tmp_path, keep=1, keep_best=False) as writer:
        writer.write(manifest_of(2), gather(model, optimizer, None), {})
    # never half of the old one under its name
    assert present == [["step-000002"]]
    assert names(tmp_path) == ["step-000002"]


def test_what_a_killed_process_left_is_removed(trained, tmp_path):
    saved(tmp_path, 1, *trained)
    for name in (".step-000007.partial", ".step-000001.dropped"):
        shutil.copytree(tmp_path / "checkpoints" / "step-000001", tmp_path / "checkpoints" / name)
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == [1]
    drop_unfinished(tmp_path)
    assert names(tmp_path) == ["step-000001"]


# ---- behind the training


@pytest.fixture
def slow_disk(monkeypatch):
    """Hold back what is written until told otherwise."""
    gate = threading.Event()

    def wait(*arguments):
        assert gate.wait(10)
        save_file(*arguments)

    monkeypatch.setattr(seqmix.training.checkpoint, "save_file", wait)
    yield gate
    gate.set()


def test_steps_go_on_while_a_checkpoint_is_written(trained, tmp_path, slow_disk):
    model, optimizer = trained
    expected = model.embedding.weight.detach().clone()
    with Writer(tmp_path, keep=1, keep_best=False) as writer:
        folder = writer.write(manifest_of(1), gather(model, optimizer, None), {})
        assert not folder.exists()
        with torch.no_grad():  # the numbers were taken before
            model.embedding.weight.zero_()
        slow_disk.set()
    assert torch.equal(load_file(folder / FILES[0])["embedding.weight"], expected)


def test_one_is_written_at_a_time(trained, tmp_path, slow_disk):
    model, optimizer = trained
    with Writer(tmp_path, keep=9, keep_best=False) as writer:
        writer.write(manifest_of(1), gather(model, optimizer, None), {})
        threading.Timer(0.05, slow_disk.set).start()
        writer.write(manifest_of(2), gather(model, optimizer, None), {})
        assert (tmp_path / "checkpoints" / "step-000001").exists()


def test_a_run_ends_with_its_checkpoints_on_the_disk(config_of, tmp_path):
    events = train(config_of(), tmp_path / "run")
    assert next(event for event in events if type(event).__name__ == "Saved").step == 2
    events.close()
    assert names(tmp_path / "run") == ["step-000002"]


def test_another_error_is_told_before_that_of_writing(tmp_path, trained, monkeypatch):
    def crash(*arguments):
        raise OSError("no disk")

    monkeypatch.setattr(seqmix.training.checkpoint, "save_file", crash)
    writer = Writer(tmp_path, keep=1, keep_best=False)
    writer.write(manifest_of(1), gather(*trained, None), {})
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError


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
    "with one bit flipped": lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["manifest.json", *FILES])
def test_a_damaged_checkpoint_is_one_sentence(trained, tmp_path, file, damage):
    path = saved(tmp_path, 1, *trained) / file
    data = path.read_bytes()
    # a bit of a number: which could be another number
    path.write_bytes(
        DAMAGE[damage](data) if (file, damage[:8]) != ("manifest.json", "with one") else b"\xfb" + data[1:]
    )
    message = refusal(lambda: verify(path.parent))
    assert message.startswith(f"{path} is damaged: ")
    assert refusal(lambda: find(tmp_path)) == message


@pytest.mark.parametrize("file", ["manifest.json", *FILES])
def test_a_missing_file_is_one_sentence(trained, tmp_path, file):
    path = saved(tmp_path, 1, *trained) / file
    path.unlink()
    assert refusal(lambda: verify(path.parent)) == f"{path} is missing"


def test_a_checkpoint_under_another_name_is_damaged(trained, tmp_path):
    folder = saved(tmp_path, 1, *trained)
    moved = folder.rename(folder.with_name("step-000009"))
    assert refusal(lambda: verify(moved)) == f"{moved / 'manifest.json'} is damaged: it is of step 1"


def test_a_number_of_the_manifest_that_changed_is_damage(trained, tmp_path):
    file = saved(tmp_path, 1, *trained, metrics={"validation_loss": 2.5}) / "manifest.json"
    file.write_text(file.read_text().replace("2.5", "1.5"))
    assert refusal(lambda: verify(file.parent)).startswith(f"{file} is damaged: its checksum")


def test_where_all_are_damaged_the_sentence_is_about_the_newest(config_of, tmp_path):
    run_of(config_of(), tmp_path / "run")
    for folder in checkpoints(tmp_path / "run"):
        (folder / FILES[0]).write_bytes(b"")
    before = contents(tmp_path / "run")
    for action in (lambda: run_of(config_of(), tmp_path / "run", resume=True), lambda: load_run(tmp_path / "run")):
        message = refusal(action)
        assert message.startswith(f"{latest(tmp_path / 'run') / FILES[0]} is damaged: it has 0 bytes")
        assert message.endswith("; and none of the 1 others is intact")
    assert contents(tmp_path / "run") == before


def test_the_next_best_is_taken_where_the_best_is_damaged(trained, tmp_path):
    for step, loss in enumerate((3.0, 1.0, 2.0, 4.0), start=1):
        saved(tmp_path, step, *trained, metrics={"validation_loss": loss})
    assert find(tmp_path, "best").manifest.step == 2
    (tmp_path / "checkpoints" / "step-000002" / FILES[0]).unlink()
    found = find(tmp_path, "best")
    assert found.manifest.step == 3
    assert len(found.notes) == 1
    assert find(tmp_path, 1).manifest.step == 1
    assert refusal(lambda: find(tmp_path, 2)).endswith("model.safetensors is missing")
    assert refusal(lambda: find(tmp_path, 7)) == (
        f"no checkpoint of {tmp_path} is of step 7; there are those of step 1, 2, 3, 4"
    )


def test_a_run_that_was_never_evaluated_has_no_best(trained, tmp_path):
    saved(tmp_path, 3, *trained)
    assert refusal(lambda: find(tmp_path, "best")) == (
        f"no checkpoint of {tmp_path} was evaluated; there are those of step 3"
    )


def test_a_manifest_says_what_computed_it(config_of, tmp_path):
    run_of(config_of(), tmp_path / "run")
    manifest = json.loads((latest(tmp_path / "run") / "manifest.json").read_text())
    assert (manifest["step"], manifest["torch"]) == (6, torch.__version__)
    assert manifest["seqmix"] == seqmix.__version__
    assert manifest["threads"] == torch.get_num_threads()
    assert set(manifest["metrics"]) == {"loss", "validation_loss"}


def test_a_state_of_another_model_or_batch_is_one_sentence(config_of, tmp_path):
    run_of(config_of("training.carry_state=true"), tmp_path / "run")
    folder, model = latest(tmp_path / "run"), build_model(config_of().model)
    assert load_state(folder, model, 4)
    assert "of a batch of another size" in refusal(lambda: load_state(folder, model, 5))
    other = build_model(config_of("model.n_layers=3").model)
    assert "it lacks 2." in refusal(lambda: load_state(folder, other, 4))


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
    saved(tmp_path, 3, *trained)
    (tmp_path / "checkpoints" / "step-best").mkdir()
    (tmp_path / "checkpoints" / "step-000009").write_text("a file")
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000003"]


def test_moments_alone_may_be_foreign(config_of, tmp_path):
    run_of(config_of("model.d_model=32"), tmp_path / "other", stop=lambda: True)
    run_of(config_of(), tmp_path / "run", stop=lambda: True)
    shutil.copy(latest(tmp_path / "other") / FILES[1], latest(tmp_path / "run"))
    model = build_model(config_of().model)
    optimizer = build_optimizer(model, config_of().training)
    message = refusal(lambda: load_optimizer(latest(tmp_path / "run"), model, optimizer))
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
