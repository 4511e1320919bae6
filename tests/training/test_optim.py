"""The optimizer's parameter groups, and the learning rate at the key steps of each schedule."""

import math
from itertools import pairwise

import pytest
import torch
from small_runs import metrics, refusal, require_same_run, run_of, stopped

from seqmix import build_model
from seqmix.training import TrainingConfig
from seqmix.training.monitoring.events import Stepped
from seqmix.training.muon import Muon
from seqmix.training.optimizer import build_optimizer
from seqmix.training.schedule import learning_rate

LEARNABLE = "model.blocks.ret.mixer.learnable_decay=true"


def settings(**fields) -> TrainingConfig:
    return TrainingConfig(**{"steps": 100, "batch_size": 4, "learning_rate": 0.5} | fields)


@pytest.mark.parametrize(
    "overrides",
    [[], ["model.tie_embeddings=true"], [LEARNABLE], ["model.blocks.ret.norm={kind: layernorm, bias: true}"]],
    ids=str,
)
@pytest.mark.parametrize("preset", ["retnet-tiny", "hybrid-tiny"])
@pytest.mark.parametrize("kind", ["adamw", "muon", "normuon"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(config_of, preset, overrides, kind):
    model = build_model(config_of(*overrides, "model.n_layers=4", preset=preset).model)
    optimizer = build_optimizer(model, settings(optimizer=kind, weight_decay=0.3))
    decay = [(id(p), group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(decay) == sorted((id(p), 0.3 if p.ndim >= 2 else 0.0) for p in model.parameters())


def test_muon_updates_block_matrices_and_adamw_the_rest(config_of):
    model = build_model(config_of(LEARNABLE).model)
    optimizer = build_optimizer(model, settings(optimizer="muon", weight_decay=0.3, muon_momentum=0.8))
    adamw, of_matrices = optimizer.optimizers
    assert (type(adamw), type(of_matrices)) == (torch.optim.AdamW, Muon)
    (group,) = of_matrices.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.8, 0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    maps = ("mixer.in_proj", "mixer.out_proj", "ffn.up_proj", "ffn.down_proj")
    expected = {f"blocks.{layer}.{name}.weight" for layer in range(2) for name in maps}
    assert {names[id(parameter)] for parameter in group["params"]} == expected
    # both step, and clear gradients
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    model(torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(optimizer.state[parameter] for parameter in model.parameters())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (32, 32)])
def test_muon_step_has_the_expected_rms_for_any_shape(shape):
    """The root mean square of an update is 0.2 times the learning rate for any matrix shape."""
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(shape[1], shape[0], bias=False)])
    model.head = torch.nn.Linear(2, 2)
    matrix = model.blocks[0].weight
    before = matrix.detach().clone()
    optimizer = build_optimizer(model, settings(optimizer="muon", weight_decay=0.0))
    matrix.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert (matrix - before).square().mean().sqrt().item() == pytest.approx(0.2 * 0.5, rel=0.3)


def test_preallocated_moments_do_not_change_the_steps():
    """An optimizer whose moments exist before the first step takes the same steps as a plain AdamW."""
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    stepped = []
    for make in (
        lambda layer: build_optimizer(layer, settings(weight_decay=0.1, betas=(0.8, 0.7))),
        lambda layer: torch.optim.AdamW(layer.parameters(), lr=0.5, betas=(0.8, 0.7), weight_decay=0.1, fused=True),
    ):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 2, bias=False)
        optimizer = make(layer)
        for _ in range(3):
            layer(rows).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        stepped.append(layer.weight.detach())
    assert torch.equal(*stepped)


def rates(**fields) -> list[float]:
    config = settings(**fields)
    return [learning_rate(step, config) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
def test_warmup_rises_linearly_to_the_peak(schedule):
    decay = {"decay_steps": 1} if schedule == "wsd" else {}
    for warmup in (10, 99 if decay else 100):  # which may be the whole run
        values = rates(schedule=schedule, warmup_steps=warmup, **decay)
        assert values[:warmup] == pytest.approx([0.5 * part / warmup for part in range(1, warmup + 1)])
        assert values[warmup : warmup + 1] == pytest.approx([0.5] * (warmup < 100))
        # and one more step than there are has a rate too
        assert math.isfinite(learning_rate(100, settings(schedule=schedule, warmup_steps=warmup, **decay)))
    assert rates(schedule=schedule, **decay)[0] == 0.5
    for warmup in range(0 if decay else 2):  # a run of one step
        assert rates(steps=1, warmup_steps=warmup, schedule=schedule) == [0.5]


@pytest.mark.parametrize(
    ("schedule", "quarter", "half"),
    [("linear", 0.75, 0.5), ("cosine", (1 + math.sqrt(0.5)) / 2, 0.5), ("constant", 1.0, 1.0)],
)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_decay_ends_at_the_final_ratio_and_stays_positive_before(schedule, quarter, half, ratio):
    fields = {"schedule": schedule, "warmup_steps": 20, "final_lr_ratio": ratio}
    values, last = rates(**fields), 1.0 if schedule == "constant" else ratio
    assert values[40] == pytest.approx(0.5 * (last + (1 - last) * quarter))
    assert values[60] == pytest.approx(0.5 * (last + (1 - last) * half))
    assert learning_rate(100, settings(**fields)) == pytest.approx(0.5 * last)
    assert min(values) > 0
    assert all(later <= earlier for earlier, later in pairwise(values[20:]))


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_warmup_stable_decay_schedule_has_a_plateau(ratio):
    fields = {"schedule": "wsd", "warmup_steps": 10, "decay_steps": 20, "final_lr_ratio": ratio}
    values = rates(**fields)
    assert values[10:81] == [0.5] * 71
    assert values[90] == pytest.approx(0.5 * (1 + ratio) / 2)
    assert values[99] == pytest.approx(0.5 * (1 - (1 - ratio) * 19 / 20))
    # longer training leaves the steps before the decay as they were
    assert values[:81] == rates(**fields, steps=200)[:81]


OWN = """
import torch


def half(step, settings):
    return 0.5 if step < settings.steps // 2 else 0.25


class Sign(torch.optim.Optimizer):
    def __init__(self, groups, lr, momentum):
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                state["count"] = state.get("count", 0) + 1
                parameter -= group["lr"] / state["count"] * (mean.sign() + group["weight_decay"] * parameter)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_optimizer.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    "optimizer",
    [
        ["training.optimizer=own_optimizer:Sign", "training.optimizer_options={momentum: 0.5}"],
        ["training.optimizer=torch.optim:SGD", "training.optimizer_options={momentum: 0.9, nesterov: true}"],
    ],
    ids=["own", "torch"],
)
def test_custom_optimizer_and_schedule_resume_bitwise(config_of, tmp_path, optimizer):
    config = config_of("training.schedule=own_optimizer:half", "training.checkpoint_every=6", *optimizer)
    run_of(config, tmp_path / "whole")
    stopped(config, tmp_path / "run", 2, Stepped)
    run_of(config, tmp_path / "run", resume=True)
    require_same_run(tmp_path / "run", tmp_path / "whole")
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert rates == [config.training.learning_rate * factor for factor in (0.5, 0.5, 0.5, 0.25, 0.25, 0.25)]


@pytest.mark.usefixtures("own")
def test_unknown_or_invalid_optimizer_is_refused(config_of):
    model = build_model(config_of().model)
    for name, reason in (("own_optimizer:Sing", 'did you mean "Sign"'), ("own_optimizer:Sign", "momentum")):
        assert reason in refusal(lambda name=name: build_optimizer(model, settings(optimizer=name)))
