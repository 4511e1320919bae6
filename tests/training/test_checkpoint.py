"""Checkpoints: complete or absent, verified, and refused if they belong to another model."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from abuse.shards import seal
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import contents, refusal, require_same_run, run_of

import seqmix
from seqmix import build_model, load_run, train
from seqmix.training import CheckpointError, read_config, tensor_files
from seqmix.training.checkpoint import files as checkpoint
from seqmix.training.checkpoint.files import Best, Manifest, checkpoints, find, verify, write
from seqmix.training.checkpoint.train_state import load_model, load_optimizer, load_state, local_parts, metadata_of
from seqmix.training.optimizer import build_optimizer

FILES = ("model.safetensors", "optimizer.safetensors")


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def latest(run: Path) -> Path:
    return checkpoints(run)[-1]


def refused(action) -> str:
    return refusal(action, CheckpointError)


def manifest_of(step: int, **fields) -> Manifest:
    return Manifest(**{"step": step, "seqmix": "1", "torch": "2", "threads": 1, "metrics": {}, "best": Best()} | fields)


def saved(run: Path, step: int, model, optimizer, **fields) -> Path:
    """Write a checkpoint of these."""
    return write(run, manifest_of(step, **fields), local_parts(model, optimizer), metadata_of(model.config, step))


def made_of(config, *, steps: int = 0, frozen: bool = False, seed: int = 0):
    """A model and its optimizer, after some steps."""
    model = build_model(config.model, seed=seed)
    model.head.weight.requires_grad_(not frozen)
    optimizer = build_optimizer(model, config.training)
    for step in range(steps):
        model(torch.tensor([[step, 1, 2, 3]])).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.fixture
def made(config_of):
    return made_of(config_of())


@pytest.mark.parametrize(("kind", "moments"), [("adamw", 3), ("muon", 1), ("frozen", 3)])
def test_checkpoint_round_trip_is_bitwise_exact(config_of, tmp_path, kind, moments):
    config = config_of(*([] if kind == "frozen" else [f"training.optimizer={kind}"]))
    model, optimizer = made_of(config, steps=3, frozen=kind == "frozen")
    folder = saved(tmp_path, 7, model, optimizer)
    assert folder == tmp_path / "checkpoints" / "step-000007"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", *FILES]
    parameters, state = (load_file(folder / file) for file in FILES)
    assert parameters.keys() == dict(model.named_parameters()).keys()
    with safe_open(folder / FILES[0], "pt") as file:
        assert file.metadata()["seqmix.step"] == "7"
    other, its = made_of(config, seed=1, frozen=kind == "frozen")
    load_model(folder, other)
    load_optimizer(folder, other, its)
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, parameters[name])
        assert torch.equal(mine, theirs)
        assert optimizer.state[mine].keys() == its.state[theirs].keys()
        kept = 3 if mine.ndim < 2 or "blocks" not in name else moments
        assert len(its.state[theirs]) == (kept if mine.requires_grad else 0)
        assert any(value.any() for value in its.state[theirs].values()) == mine.requires_grad
        for key, value in optimizer.state[mine].items():
            assert torch.equal(state[f"{key}.{name}"], value)
            assert torch.equal(its.state[theirs][key], value)
            assert its.state[theirs][key].dtype is value.dtype


def test_moments_are_not_confused_between_names_with_the_same_suffix(config_of, tmp_path):
    config = config_of("training.optimizer=torch.optim:Adam", preset="gla-tiny")
    model, optimizer = made_of(config)
    model(torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
    model.norm.weight.grad = None  # blocks.0.mixer.norm.weight has a gradient
    optimizer.step()
    folder = saved(tmp_path, 1, model, optimizer)
    other, its = made_of(config, seed=1)
    load_optimizer(folder, other, its)
    assert not its.state.get(other.norm.weight)
    state = its.state[other.blocks[0].mixer.norm.weight]
    assert torch.equal(state["exp_avg"], optimizer.state[model.blocks[0].mixer.norm.weight]["exp_avg"])


def test_carried_state_and_manifest_are_saved_without_pickle(config_of, tmp_path):
    run = tmp_path / "run"
    run_of(config_of("training.carry_state=true"), run)
    suffixes = {file.suffix for file in run.rglob("*") if file.is_file()}
    assert suffixes == {".yaml", ".json", ".jsonl", ".safetensors", ".lock"}
    manifest = json.loads((latest(run) / "manifest.json").read_text())
    assert (manifest["step"], manifest["torch"], manifest["seqmix"]) == (6, torch.__version__, seqmix.__version__)
    assert manifest["threads"] == torch.get_num_threads()
    assert set(manifest["metrics"]) == {"loss", "validation_loss"}
    model, deeper = (build_model(config_of(f"model.n_layers={n}").model) for n in (2, 3))
    assert load_state(latest(run), model, 4)
    assert "batch_size = 4, got 5" in refused(lambda: load_state(latest(run), model, 5))
    assert " 2." in refused(lambda: load_state(latest(run), deeper, 4))


def test_carried_state_with_wrong_shapes_or_dtypes_is_refused(config_of, tmp_path):
    """The checksum is recomputed after each change, so only the checks of the tensors can refuse it."""
    run = tmp_path / "run"
    run_of(config_of("training.carry_state=true", "data.sequence_length=8"), run)
    folder, model = latest(run), build_model(config_of().model)
    file = folder / "state.safetensors"
    whole = load_file(file)
    memory, position = whole["0.memory"], whole["0.position"]
    for changed, words in (
        (
            {"0.memory": position, "0.position": memory},
            r"expected 0.memory to be torch.float32 \[rows, 2, 8, 16\], got torch.int64 \[4\]",
        ),
        ({"0.memory": memory.transpose(2, 3).contiguous()}, r"expected 0.memory to be .*, got torch.float32 \[4, "),
        ({"0.memory": memory.to(torch.int64)}, "got torch.int64"),
        (
            {"0.position": position.to(torch.float32)},
            r"expected 0.position to be torch.int64 \[rows\], got torch.float32",
        ),
        ({"0.position": position - 100}, "expected 0.position to count tokens, .* got -"),
    ):
        save_file(whole | changed, file)
        seal(folder)
        with pytest.raises(CheckpointError, match=words):
            load_state(folder, model, 4)
        with pytest.raises(CheckpointError, match=words):
            list(train(read_config(run, ["training.steps=8"]), run, resume=True))
    save_file(whole | {"0.memory": memory.double()}, file)
    assert load_state(folder, model, 4)[0].memory.dtype is torch.float64


def test_checkpoint_metadata_imports_no_module(config_of, tmp_path, monkeypatch):
    run_of(config_of(), run := tmp_path / "run")
    folder, model = latest(run), build_model(config_of().model)
    fields = json.loads(config_of().model.model_dump_json())
    fields["blocks"]["ret"]["mixer"]["kind"] = "strangers_metadata:Config"
    (tmp_path / "strangers_metadata.py").write_text(
        "from seqmix.mixers.retention import RetentionConfig as Config\nfrom pathlib import Path\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = folder / "model.safetensors"
    save_file(load_file(file), file, {"seqmix.model": json.dumps(fields)})
    seal(folder)
    assert "does not match the model" in refused(lambda: load_model(folder, model))
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_torch_distributed_checkpoint_reads_a_saved_checkpoint(config_of, tmp_path):
    import torch.distributed.checkpoint as dcp

    trained = made_of(config_of(), steps=3)
    folder, parts = saved(tmp_path, 7, *trained), local_parts(*trained)
    expected = {name: chunk.values for chunks in parts.values() for name, chunk in chunks.items()}
    wanted = {name: torch.zeros_like(x) for name, x in expected.items()}
    dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(wanted[name], tensor) for name, tensor in expected.items())


def test_checkpoints_lists_numbered_folders_in_step_order(made, tmp_path):
    for step in (999_999, 1_000_001, 5):
        saved(tmp_path, step, *made)
    (tmp_path / "checkpoints" / "step-best").mkdir()
    (tmp_path / "checkpoints" / "step-000009").write_text("a file")
    assert [checkpoint.step_of(folder) for folder in checkpoints(tmp_path)] == [5, 999_999, 1_000_001]
    assert find(tmp_path).folder == latest(tmp_path)
    # one of the same step is replaced
    with torch.no_grad():
        made[0].embedding.weight.zero_()
    assert not load_file(saved(tmp_path, 5, *made) / FILES[0])["embedding.weight"].any()


def test_newest_and_best_checkpoints_are_kept(made, tmp_path):
    for step, loss in enumerate((3.0, 1.0, 2.0, 1.0, None), start=1):
        saved(tmp_path, step, *made, metrics={} if loss is None else {"validation_loss": loss})
    checkpoint.delete_others(tmp_path, 5, keep=2, keep_best=True)
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005"]  # of equal ones, the first
    checkpoint.delete_others(tmp_path, 5, keep=1, keep_best=False)
    assert names(tmp_path) == ["step-000005"]
    # a run resumed before it: what comes after its step is obsolete
    for step in (2, 4, 6, 3):
        saved(tmp_path, step, *made)
    checkpoint.delete_others(tmp_path, 3, keep=2, keep_best=False)
    assert names(tmp_path) == ["step-000002", "step-000003"]


@pytest.mark.parametrize("failing", [1, 2])
def test_failed_write_keeps_the_previous_checkpoint(config_of, tmp_path, whole, monkeypatch, failing):
    config, run, calls = config_of(), tmp_path / "run", []

    def crash(tensors, file, metadata=None):
        calls.append(file)
        if len(calls) == 2 + failing:  # in the second checkpoint
            Path(file).write_bytes(b"half of a fi")
            raise OSError(28, "No space left on device")
        save_file(tensors, file, metadata)

    monkeypatch.setattr(tensor_files, "save_file", crash)
    message = refused(lambda: run_of(config, run))
    assert str(run / "checkpoints" / "step-000004") in message
    assert message.endswith("No space left on device")
    monkeypatch.setattr(tensor_files, "save_file", save_file)
    assert [folder.name for folder in checkpoints(run)] == ["step-000002"]
    assert load_run(run)
    started, *_ = run_of(config, run, resume=True)
    assert started.step == 2
    assert names(run) == ["step-000004", "step-000006"]  # and nothing of the half one
    require_same_run(run, whole(config))


def test_checkpoint_is_named_only_after_its_files_are_flushed(made, tmp_path, monkeypatch):
    seen, written = [], []

    def watch(path):
        seen.append((path.name, len(checkpoints(tmp_path))))
        written.append(path.stat().st_ino)

    monkeypatch.setattr(checkpoint, "flush", watch)
    monkeypatch.setattr("seqmix.registry.files.flush", watch)
    folder = saved(tmp_path, 1, *made)
    # all files and the folder are flushed before it has its name, and then the name
    assert sorted(seen[:-1]) == [
        (name, 0) for name in sorted((".step-000001.partial", "manifest.json", *(f".{file}.partial" for file in FILES)))
    ]
    assert seen[-1] == ("checkpoints", 1)
    assert folder.stat().st_ino in written  # renamed, not copied


def test_old_checkpoint_is_deleted_only_after_the_new_one_exists(made, tmp_path, monkeypatch):
    saved(tmp_path, 1, *made)
    present, rmtree = [], shutil.rmtree

    def watch(path, *args, **kwargs):
        if Path(path).name == ".step-000001.deleted" and Path(path).exists():
            present.append([folder.name for folder in checkpoints(tmp_path)])
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", watch)
    with checkpoint.Writer(tmp_path, keep=1, keep_best=False) as writer:
        writer.write(manifest_of(2), local_parts(*made), {})
    # never half of the old one under its name
    assert present == [["step-000002"]]
    assert names(tmp_path) == ["step-000002"]
    # what a killed process left half written or half deleted
    for name in (".step-000007.partial", ".step-000001.deleted"):
        shutil.copytree(latest(tmp_path), latest(tmp_path).with_name(name))
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-000002"]
    checkpoint.delete_unfinished(tmp_path)
    assert names(tmp_path) == ["step-000002"]


def test_checkpoints_are_written_in_the_background_one_at_a_time(made, tmp_path, monkeypatch):
    slow_disk = threading.Event()

    def wait(*arguments):
        assert slow_disk.wait(10)
        save_file(*arguments)

    monkeypatch.setattr(tensor_files, "save_file", wait)
    expected = made[0].embedding.weight.detach().clone()
    with checkpoint.Writer(tmp_path, keep=9, keep_best=False) as writer:
        first = writer.write(manifest_of(1), local_parts(*made), {})
        assert not first.exists()
        with torch.no_grad():  # the numbers were taken before
            made[0].embedding.weight.zero_()
        threading.Timer(0.05, slow_disk.set).start()
        writer.write(manifest_of(2), local_parts(*made), {})
        assert first.exists()
    assert torch.equal(load_file(first / FILES[0])["embedding.weight"], expected)


def test_closing_a_run_finishes_its_pending_checkpoint(config_of, tmp_path):
    events = train(config_of(), tmp_path / "run")
    assert next(event for event in events if type(event).__name__ == "Saved").step == 2
    events.close()
    assert names(tmp_path / "run") == ["step-000002"]


def test_other_errors_take_precedence_over_write_errors(tmp_path, made, monkeypatch):
    def crash(*arguments):
        raise OSError("no disk")

    monkeypatch.setattr(tensor_files, "save_file", crash)
    writer = checkpoint.Writer(tmp_path, keep=1, keep_best=False)
    writer.write(manifest_of(1), local_parts(*made), {})
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError


def flipped(data: bytes) -> bytes:
    """One bit of a number: which could be another number."""
    return data[:-9] + bytes([data[-9] ^ 4]) + data[-8:] if data[:1] != b"{" else data.replace(b"2.5", b"1.5")


DAMAGE = {
    "missing": None,
    "truncated": lambda data: data[: len(data) // 2],
    "cut in its header": lambda data: data[:20],
    "empty": lambda data: b"",
    "garbage": lambda data: b"garbage" * 100,
    "not utf-8": lambda data: b"\xfb" + data[1:],
    "a header of garbage": lambda data: data[:8] + b"\xff" * (len(data) - 8),
    "longer": lambda data: data + b"more",
    "another number": flipped,
}


@pytest.mark.parametrize("file", ["manifest.json", *FILES])
def test_damaged_checkpoint_error_names_the_file(made, tmp_path, file):
    path = saved(tmp_path, 1, *made, metrics={"validation_loss": 2.5}) / file
    data = path.read_bytes()
    for damage in DAMAGE.values():
        if damage is None:
            path.unlink()
        else:
            path.write_bytes(damage(data))
            assert path.read_bytes() != data
        message = refused(lambda: verify(path.parent))
        assert message.startswith(f"{path} is {'missing' if damage is None else 'damaged'}")
        assert refused(lambda: find(tmp_path)) == message
    path.write_bytes(data)
    moved = path.parent.rename(path.parent.with_name("step-000009"))
    assert str(moved / "manifest.json") in refused(lambda: verify(moved))


def test_error_names_the_newest_checkpoint_when_all_are_damaged(config_of, tmp_path):
    run = tmp_path / "run"
    run_of(config_of(), run)
    for folder in checkpoints(run):
        (folder / FILES[0]).write_bytes(b"")
    before = contents(run)
    for action in (lambda: run_of(config_of(), run, resume=True), lambda: load_run(run)):
        assert refused(action).startswith(f"{latest(run) / FILES[0]} is damaged")
    assert contents(run) == before


def test_next_best_checkpoint_is_used_when_the_best_is_damaged(made, tmp_path):
    for step, loss in enumerate((3.0, 1.0, 2.0, 4.0), start=1):
        saved(tmp_path, step, *made, metrics={"validation_loss": loss})
    assert find(tmp_path, "best").manifest.step == 2
    missing = tmp_path / "checkpoints" / "step-000002" / FILES[0]
    missing.unlink()
    found = find(tmp_path, "best")
    assert (found.manifest.step, len(found.notes)) == (3, 1)
    assert find(tmp_path, 1).manifest.step == 1
    assert str(missing) in refused(lambda: find(tmp_path, 2))
    message = refused(lambda: find(tmp_path, 7))
    assert all(part in message for part in (str(tmp_path), "step 7", "1, 2, 3, 4"))
    other = tmp_path / "other"
    assert str(other) in refused(lambda: find(other))  # without any
    saved(other, 3, *made)  # never evaluated
    assert str(other) in refused(lambda: find(other, "best"))


FOREIGN = {
    "wider": (["model.d_model=32"], "embedding.weight .*257, 16.*257, 32"),
    "deeper": (["model.n_layers=3"], "blocks.2."),
    "shallower": (["model.n_layers=1"], "blocks.1."),
    "of another mixer": (["model.blocks.ret.mixer={kind: attention, n_heads: 2}"], "blocks.0."),
    "with more parameters": (["model.blocks.ret.norm={kind: layernorm, bias: true}"], r"0.ffn_norm.bias.* 3 more"),
    # of the same shapes, and another function
    "with another decay": (["model.blocks.ret.mixer.decay=geometric"], None),
    "with another eps": (["model.blocks.ret.norm.eps=1.0e-3"], None),
    "with another activation": (["model.blocks.ret.ffn.activation=relu"], None),
}


@pytest.mark.parametrize("other", FOREIGN)
def test_checkpoint_of_another_model_is_refused_and_changes_nothing(config_of, tmp_path, other):
    overrides, named = FOREIGN[other]
    folder = saved(tmp_path, 1, *made_of(config_of(*overrides)))
    model, optimizer = made_of(config_of())
    before = [parameter.clone() for parameter in model.parameters()]
    assert "config.yaml" in refused(lambda: load_model(folder, model))
    if named is not None:
        # as another program would write it: without metadata
        save_file(load_file(folder / FILES[0]), folder / FILES[0])
        with pytest.raises(CheckpointError, match=named):
            load_model(folder, model)
        assert str(folder / FILES[1]) in refused(lambda: load_optimizer(folder, model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("make", "what"), [(None, "does not exist"), (Path.mkdir, r"config\.yaml"), (Path.touch, "is a file")]
)
def test_folder_that_is_not_a_run_is_refused(tmp_path, make, what):
    if make:
        make(tmp_path / "run")
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'run'} .*{what}"):
        read_config(tmp_path / "run")
