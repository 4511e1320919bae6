"""Linearizing: transferred weights, training stages, resuming, and the comparison with the teacher."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_runs import refusal, run_of

from seqmix import SeqmixError, load_run
from seqmix.lab.linearize import Linearization, Plan, load_plan
from seqmix.lab.linearize.measure import gap_closed
from seqmix.lab.linearize.transfer import regroup_heads, transfer
from seqmix.mixers.attention import AttentionConfig
from seqmix.mixers.gated_delta_net import GatedDeltaNetConfig
from seqmix.mixers.mamba import MambaConfig
from seqmix.mixers.retention import RetentionConfig
from seqmix.training import read_config
from seqmix.training.checkpoint.files import checkpoints
from seqmix.training.checkpoint.train_state import parameters_of

GDN = {"kind": "gated_delta_net", "n_heads": 2, "expand_v": 1.0, "chunk_size": 16}
GLA = {"kind": "gla", "n_heads": 2, "expand_k": 1.0, "chunk_size": 16}
SHORT = {"tokens": 2 * 4 * 16, "learning_rate": 1e-2}
STAGES = {"mixer_output": SHORT, "hidden": SHORT, "logits": {**SHORT, "train": "all"}, "text": SHORT}


@pytest.fixture(autouse=True)
def _little_is_timed(monkeypatch):
    monkeypatch.setattr("seqmix.lab.linearize.measure.DECODED", 3)


@pytest.fixture
def teacher(config_of, tmp_path) -> Path:
    """A small trained Transformer of three layers."""
    run = tmp_path / "teacher"
    few = ("training.evaluate_every=100", "training.final_evaluation_batches=2", "training.checkpoint_every=100")
    run_of(config_of("model.n_layers=3", "training.steps=3", *few, preset="attention-tiny"), run)
    return run


def plan_of(*swap, **fields) -> Plan:
    return Plan.model_validate({"swap": swap, "calibration_tokens": 64, **fields})


def linearized(source: Path, plan: Plan, out: Path, **options):
    work = Linearization(source, plan, out, device="cpu", **options)
    work.prepare()
    for name in plan.staged:
        for _ in work.stage(name) or ():
            pass
    return work, work.finish()


def logits_of(run: Path) -> torch.Tensor:
    tokens = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return load_run(run)(tokens).logits


def test_result_without_swaps_is_bitwise_equal_to_teacher(teacher, tmp_path):
    _, found = linearized(teacher, plan_of(), tmp_path / "out")
    assert torch.equal(logits_of(teacher), logits_of(tmp_path / "out"))
    assert found.student == found.prepared.teacher
    assert found.student.divergence == 0
    assert found.student.agreement == 1
    assert found.gap_closed is None


def test_swap_with_same_mixer_kind_copies_all_weights(teacher, tmp_path):
    same = {"layers": [1], "mixer": {"kind": "attention", "n_heads": 4}}
    _, found = linearized(teacher, plan_of(same), tmp_path / "out")
    assert torch.equal(logits_of(teacher), logits_of(tmp_path / "out"))
    (taken,) = found.prepared.taken
    assert taken.initial == ()


def test_all_stages_train_and_write_an_ordinary_run(teacher, tmp_path, seqmix):
    swap = {"layers": [0], "mixer": GDN}, {"layers": [2], "mixer": GLA}
    out = tmp_path / "out"
    work, found = linearized(teacher, plan_of(*swap, stages=STAGES), out)
    assert [*found.stages] == [*STAGES]
    assert found.tokens == 4 * SHORT["tokens"]
    assert found.prepared.start.loss > found.prepared.teacher.loss
    assert found.decoding["student"].state_bytes < found.decoding["teacher"].state_bytes
    assert read_config(out).model.layers == ("attn_gated_delta_net", "attn", "attn_gla")
    assert json.loads((out / "linearize.json").read_text())["gap_closed"] == found.gap_closed
    rows = (out / "linearize.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        *("teacher", "random mixers", "transferred", *(f"after {name}" for name in STAGES), "student")
    ]
    # the stages train what they say
    steps = [checkpoints(out / "stages" / name)[-1] for name in ("0-transfer", "2-hidden", "3-logits")]
    models = [parameters_of(load_run(step.parents[1])) for step in steps]
    changed = [{n for n in a if not torch.equal(a[n], b[n])} for a, b in pairwise(models)]
    assert all(name.startswith(("blocks.0.mixer.", "blocks.2.mixer.")) for name in changed[0])
    assert "blocks.1.mixer.out_proj.weight" in changed[1]
    assert "blocks.0.mixer.in_proj.weight" in changed[0]
    assert work.stage("text") is None  # it has ended
    assert seqmix("generate", out, "--prompt", "the", "--max-new-tokens", "2").status == 0
    assert seqmix("export", out, "--out", tmp_path / "out.safetensors").status == 0
    assert seqmix("evaluate", out, "--length", "16").status == 0


def test_mixer_output_stage_brings_outputs_closer_to_teacher(teacher, tmp_path):
    stages = {"mixer_output": {"tokens": 40 * 64, "learning_rate": 1e-2}}
    work = Linearization(teacher, plan_of({"layers": [1], "mixer": GLA}, stages=stages), tmp_path / "out", device="cpu")
    work.prepare()
    losses = [event.loss for event in work.stage("mixer_output") if type(event).__name__ == "Stepped"]
    assert losses[-1] < 0.8 * losses[0] < 1
    assert work.finish().student.divergence < work.prepared.start.divergence


def test_stopped_stage_resumes_with_bitwise_equal_result(teacher, tmp_path):
    plan = plan_of({"layers": [1], "mixer": GDN}, stages={"hidden": SHORT, "logits": {**SHORT, "tokens": 256}})
    linearized(teacher, plan, tmp_path / "whole")
    work = Linearization(teacher, plan, tmp_path / "parts", device="cpu")
    work.prepare()
    list(work.stage("hidden"))
    events = []
    for event in work.stage("logits", lambda: any(type(e).__name__ == "Stepped" for e in events)):
        events.append(event)
    assert max(event.step for event in events) == 1
    linearized(teacher, plan, tmp_path / "parts")
    parts = [parameters_of(load_run(tmp_path / name)) for name in ("whole", "parts")]
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])


def test_keep_best_keeps_the_costliest_attention_layers(teacher, tmp_path):
    plan = plan_of({"mixer": RetentionConfig(n_heads=2).model_dump()}, keep={"best": 2})
    work, found = linearized(teacher, plan, tmp_path / "out")
    prepared = found.prepared
    assert [*prepared.costs] == ["0", "1", "2"]
    assert {*map(str, prepared.kept)} == {*sorted(prepared.costs, key=prepared.costs.get)[1:]}
    assert [*work.swapped] == [layer for layer in range(3) if layer not in prepared.kept]
    assert [block.mixer.kind for block in load_run(tmp_path / "out").blocks].count("attention") == 2


def test_projections_are_transferred_by_head():
    old = AttentionConfig(n_heads=4, n_kv_heads=2).build(32, layer_idx=0, n_layers=1)
    new = GatedDeltaNetConfig(n_heads=4).build(32, layer_idx=0, n_layers=1)  # values twice as wide
    done = transfer(old, new, ["q", "k", "v", "o"])
    theirs, ours = old.projections, new.projections
    torch.testing.assert_close(ours["q"], theirs["q"])
    for role in "kv":
        torch.testing.assert_close(ours[role][:, :8], theirs[role].repeat_interleave(2, 0))
    torch.testing.assert_close(ours["o"][:, :8], theirs["o"])
    assert done == {"q": "copied", "k": "2 x 8 to 4 x 8", "v": "2 x 8 to 4 x 16", "o": "4 x 8 to 4 x 16"}
    assert transfer(old, MambaConfig().build(32, layer_idx=0, n_layers=1), ["q", "k", "v", "o"]) == {}


def test_regroup_heads_joins_and_splits_heads():
    weight = torch.arange(24.0).view(4, 2, 3)
    torch.testing.assert_close(regroup_heads(weight, 2), weight.view(2, 4, 3))
    torch.testing.assert_close(regroup_heads(weight, 8), weight.view(8, 1, 3))
    torch.testing.assert_close(regroup_heads(weight[:, :1], 8), weight[:, :1].repeat_interleave(2, 0))
    assert regroup_heads(weight, 3) is None


def test_gap_closed_is_a_fraction_of_the_initial_gap():
    assert gap_closed(4.0, 2.5, 2.0) == 0.75
    assert gap_closed(2.0, 2.0, 2.0) is None


def test_impossible_plans_raise(teacher, tmp_path, monkeypatch):
    def begun(*swap, **fields):
        return Linearization(teacher, plan_of(*swap, **fields), tmp_path / "out", device="cpu")

    message = refusal(lambda: begun({"layers": [3], "mixer": GLA}))
    assert message == "swap expects layers from 0 to 2, got layer 3"
    message = refusal(lambda: begun({"mixer": GLA}, {"layers": [1], "mixer": GDN}))
    assert message == "swap must name each layer once, got layer 1 twice: remove one"
    assert "swapped layers (1), got 2" in refusal(lambda: begun({"layers": [1], "mixer": GLA}, keep={"best": 2}))
    assert "training" in refusal(lambda: begun({"layers": [1], "mixer": GLA}, training={"steeps": 1}, stages=STAGES))
    work = Linearization(teacher, plan_of(stages=STAGES), tmp_path / "none", device="cpu")
    work.prepare()
    other = lambda: Linearization(teacher, plan_of(), tmp_path / "none", device="cpu")  # noqa: E731
    assert "another source or plan" in refusal(other)
    assert "nothing is swapped" in refusal(lambda: work.stage("mixer_output"))
    with pytest.raises(SeqmixError, match="not an empty directory"):
        Linearization(teacher, plan_of(), teacher, device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in refusal(lambda: Linearization(teacher, plan_of(), tmp_path / "two", device="cpu"))


def test_hidden_stage_requires_plain_residual_connections(config_of, tmp_path):
    small = ("model.n_layers=2", "training.steps=1", "training.final_evaluation_batches=1")
    teacher = tmp_path / "teacher"
    run_of(config_of(*small, "model.residual={kind: attention}", preset="attention-tiny"), teacher)
    plan = plan_of({"layers": [1], "mixer": GLA}, stages={"hidden": {"tokens": 64, "learning_rate": 1e-3}})
    message = refusal(lambda: Linearization(teacher, plan, tmp_path / "out", device="cpu"))
    assert "needs the residual connection plain, got attention: leave the stage out" in message
    stages = {"logits": {"tokens": 64, "learning_rate": 1e-3}}
    linearized(teacher, plan_of({"layers": [1], "mixer": GLA}, stages=stages), tmp_path / "out")
    assert load_run(tmp_path / "out").config.residual.kind == "attention"


def test_invalid_plan_can_be_corrected_before_the_first_stage(teacher, tmp_path, refused, seqmix):
    file, out = tmp_path / "plan.yaml", tmp_path / "out"
    file.write_text("swap: [{layers: [1], mixer: {kind: gla, n_heads: 3}}]\n")
    assert "n_heads = " in refused("linearize", teacher, file, "--out", out)
    file.write_text("swap: [{layers: [1], mixer: {kind: gla, n_heads: 2}}]\n")
    assert seqmix("linearize", teacher, file, "--out", out, "--dry-run").status == 0
    assert not out.exists()
    # interrupted before the first stage was there: another plan may take its place
    out.mkdir()
    (out / "plan.yaml").write_text(f"# of {teacher.absolute()}\nswap: []\n")
    Linearization(teacher, load_plan(file), out, device="cpu")
    # a plan that somebody wrote there is not replaced
    assert "another source or plan" in refused("linearize", teacher, file, "--out", tmp_path)
    assert file.read_text().startswith("swap: [{")


def test_command_shows_plan_and_comparison(teacher, tmp_path, seqmix):
    file = tmp_path / "plan.yaml"
    file.write_text(
        "swap: [{layers: [1], mixer: {kind: gla, n_heads: 2}}]\ncalibration_tokens: 64\n"
        "stages: {logits: {tokens: 64, learning_rate: 0.01}}\n"
    )
    assert load_plan(file).staged["logits"].tokens == 64
    shown = seqmix("linearize", teacher, file, "--out", tmp_path / "out", "--dry-run")
    assert shown.status == 0
    assert "gla" in shown.out
    assert not (tmp_path / "out").exists()
    done = seqmix("linearize", teacher, file, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    for words in ("by the teacher's reach", "initialised: ", "gap closed", "ms/token"):
        assert words in done.out
