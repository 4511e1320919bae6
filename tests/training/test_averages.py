"""Averages of weights: the moving average of a run and the mean of its last checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import contents, refusal, require_same_run, run_of, small_disk, stopped

from seqmix import build_model, load_run, train
from seqmix.training import export_run
from seqmix.training.checkpoint import files as checkpoint
from seqmix.training.checkpoint.averaging import average_run
from seqmix.training.checkpoint.run_dir import claim
from seqmix.training.monitoring.events import Noted, Stepped
from seqmix.training.optimizer import build_optimizer

EMA = ("training.ema=0.4", "training.checkpoint_every=1", "training.keep_checkpoints=9")


def weights(run: Path, step: int, part: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:06d}/{part}.safetensors")


def test_moving_average_follows_the_parameters(config_of, tmp_path):
    config = config_of(*EMA)
    run = tmp_path / "run"
    run_of(config, run)
    for step in range(1, 6):
        decay = min(0.4, (1 + step) / (10 + step))
        before, now, found = weights(run, step, "ema"), weights(run, step + 1), weights(run, step + 1, "ema")
        assert found.keys() == now.keys()
        for name in now:
            torch.testing.assert_close(found[name], before[name].lerp(now[name], 1 - decay))
    loaded = dict(load_run(run, ema=True).named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in weights(run, 6, "ema").items() if name in loaded)
    assert not all(torch.equal(loaded[name], value) for name, value in weights(run, 6).items() if name in loaded)
    # a resumed run goes on with it
    stopped(config, tmp_path / "other", 3, Stepped)
    run_of(config, tmp_path / "other", resume=True)
    require_same_run(tmp_path / "other", run)
    # and what is exported with it is it
    export_run(run, tmp_path / "ema.safetensors", ema=True)
    exported = dict(load_run(tmp_path / "ema.safetensors").named_parameters())
    assert all(torch.equal(exported[name], value) for name, value in loaded.items())


def test_evaluate_and_generate_accept_ema_weights(config_of, tmp_path, seqmix):
    run_of(config_of("training.ema=0.4", "training.steps=2"), tmp_path / "run")
    run_of(config_of("training.steps=2"), tmp_path / "plain")
    losses = []
    for options in ((), ("--ema",)):
        length = ("--length", "16", "--tokens", "64", "--json", "found.json")
        assert seqmix("evaluate", tmp_path / "run", *length, *options).status == 0
        (found,) = json.loads(Path("found.json").read_text())["runs"].values()
        losses.append(found["lengths"][0]["losses"]["chunkwise"])
    assert losses[0] != losses[1]
    assert seqmix("generate", tmp_path / "run", "--prompt", "a", "--max-new-tokens", "2", "--ema").status == 0
    assert "without training.ema" in refusal(lambda: load_run(tmp_path / "plain", ema=True))


def test_average_command_averages_the_last_checkpoints(config_of, tmp_path, seqmix):
    run_of(config_of("training.checkpoint_every=1", "training.keep_checkpoints=3"), tmp_path / "run")
    done = seqmix("average", tmp_path / "run", "--checkpoints", "3", "--out", tmp_path / "mean")
    assert "has weights but no optimizer state" in seqmix("train", "--resume", tmp_path / "mean").err
    assert "steps 4, 5, 6" in done.out
    model = dict(load_run(tmp_path / "mean").named_parameters())
    parts = [weights(tmp_path / "run", step) for step in (4, 5, 6)]
    for name, value in model.items():
        torch.testing.assert_close(value, sum(part[name].double() for part in parts).div(3).float(), rtol=0, atol=1e-8)
    assert seqmix("evaluate", tmp_path / "mean", "--length", "16", "--tokens", "64").status == 0
    for out, count, reason in (("more", 9, "training.keep_checkpoints"), ("mean", 2, "choose another")):
        assert reason in refusal(
            lambda out=out, count=count: average_run(tmp_path / "run", tmp_path / out, checkpoints=count)
        )


def test_commands_that_need_weights_refuse_a_run_without_checkpoints(config_of, tmp_path, seqmix, refused):
    run_of(config_of("training.checkpoint_every=1"), tmp_path / "run")
    assert seqmix("average", "run", "mean").status == 0
    assert refused("average", "run", "mean") == "mean already holds a run: choose another --out DIR"
    shutil.rmtree("mean/checkpoints")
    before = contents(tmp_path / "mean")
    refusals = {
        "no weights": (
            ("train", "--resume", "mean"),
            ("generate", "mean", "--prompt", "a"),
            ("evaluate", "mean", "--length", "16"),
            ("export", "mean", "--out", "new.safetensors"),
            ("convert", "mean", "new", "--as", "llama"),
            ("train", "retnet-tiny", "training.start_from=mean", "--out", "new"),
        ),
        "mean has (0)": (("average", "mean", "new"),),
    }
    for reason, commands in refusals.items():
        for command in commands:
            assert reason in (message := refused(*command, status=3)), command
            assert "mean" in message
    assert contents(tmp_path / "mean") == before
    assert not (tmp_path / "new").exists()


def test_run_shorter_than_its_warmup_notes_the_shortened_warmup(config_of, tmp_path):
    events = run_of(config_of("training.steps=3", "training.warmup_steps=50"), tmp_path / "run")
    (note,) = (event.text for event in events if isinstance(event, Noted))
    assert note == "training.warmup_steps = 50 is shortened to 3, since training.steps is 3"
    rates = [event.learning_rate for event in events if isinstance(event, Stepped)]
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3])


def test_training_device_can_be_chosen(config_of, tmp_path, seqmix):
    config = config_of("training.steps=2")
    (started, *_) = run_of(config, tmp_path / "run", device="cpu")
    assert started.device == torch.device("cpu")
    done = seqmix("train", tmp_path / "run" / "config.yaml", "--out", tmp_path / "other", "--device", "cuda:77")
    assert done.status == 2
    assert "'cuda:77' cannot be used" in done.err


def test_averaging_falls_back_when_a_checkpoint_is_deleted_meanwhile(config_of, tmp_path, monkeypatch):
    run_of(config_of("training.checkpoint_every=1", "training.keep_checkpoints=9"), tmp_path / "run")
    verify, seen = checkpoint.verify, []

    def rotate(folder, parts):
        if not seen:
            for step in (5, 6):
                shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:06d}")
        seen.append(folder)
        return verify(folder, parts)

    monkeypatch.setattr(checkpoint, "verify", rotate)
    assert average_run(tmp_path / "run", tmp_path / "mean", checkpoints=2) == [3, 4]


def test_wrong_config_types_are_named_in_the_error(config_of, tmp_path):
    assert "RunConfig" in refusal(lambda: list(train("retnet-tiny", tmp_path / "run")))
    config = config_of()
    assert "config.training" in refusal(lambda: build_optimizer(build_model(config.model), config))


@pytest.mark.parametrize(
    ("dropout", "shared", "notes", "changed"),
    [
        (0.0, "true", 1, {"processes": 2}),
        (0.1, "false", 1, {"processes": 2}),
        (0.1, "true", 2, {"processes": 2}),
        (0.1, "true", 2, {"context_parallel": 2}),
        (0.1, "true", 1, {"threads": 9}),
    ],
)
def test_resume_notes_a_layout_change_that_alters_dropout(
    config_of, tmp_path, monkeypatch, dropout, shared, notes, changed
):
    config = config_of(f"model.blocks.ret.dropout={dropout}", f"model.blocks.ret.shared={shared}")
    stopped(config, tmp_path / "run", 2)
    read = checkpoint.read_manifest
    monkeypatch.setattr(checkpoint, "read_manifest", lambda folder: read(folder).model_copy(update=changed))
    found = [event.text for event in run_of(config, tmp_path / "run", resume=True) if isinstance(event, Noted)]
    assert len(found) == notes
    assert ("dropout" in found[-1]) == (notes == 2)


def test_full_disk_leaves_no_config_in_a_new_run(config_of, tmp_path):
    config = config_of()
    with small_disk(100):
        message = refusal(lambda: claim(tmp_path / "run", config, ""))
    assert "cannot be written" in message
    assert list((tmp_path / "run").iterdir()) == []


def test_average_accepts_the_deprecated_to_option_but_not_two_outputs(config_of, tmp_path, seqmix, refused):
    run_of(config_of("training.checkpoint_every=1"), tmp_path / "run")
    assert "average needs an output: --out DIR" in refused("average", "run")
    message = refused("average", "run", "one", "--out", "two")
    assert message == "average expects one output, got one and two: give OUT or --out, not both"
    assert not Path("one").exists()
    done = seqmix("average", "run", "--to", "mean")
    assert "average --to is now --out" in done.err
    assert load_run(tmp_path / "mean")
