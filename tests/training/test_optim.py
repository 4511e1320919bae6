"""The optimizer's groups, and the learning rate at the corners of its schedules."""

import math
from itertools import pairwise

import pytest
import torch

from seqmix import build_model
from seqmix.training import TrainingConfig
from seqmix.training.optim import build_optimizer, learning_rate


def settings(**fields) -> TrainingConfig:
    return TrainingConfig(**{"steps": 100, "batch_size": 4, "learning_rate": 0.5} | fields)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.tie_embeddings=true"],
        ["model.blocks.ret.mixer.learnable_decay=true"],
        ["model.norm={kind: rmsnorm}", "model.blocks.ret.norm={kind: layernorm, bias: true}"],
    ],
    ids=str,
)
@pytest.mark.parametrize("preset", ["retnet-tiny", "hybrid-tiny"])
def test_every_parameter_is_in_one_group(config_of, preset, overrides):
    model = build_model(config_of(*overrides, "model.n_layers=4", preset=preset).model)
    optimizer = build_optimizer(model, settings())
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert len(set(grouped)) == len(grouped)


def test_matrices_decay_and_vectors_do_not(config_of):
    model = build_model(config_of("model.blocks.ret.mixer.learnable_decay=true").model)
    optimizer = build_optimizer(model, settings(weight_decay=0.3))
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in model.parameters():
        assert decay[id(parameter)] == (0.3 if parameter.ndim == 2 else 0.0)


def test_a_model_without_vectors_has_no_empty_group():
    optimizer = build_optimizer(torch.nn.Linear(2, 2, bias=False), settings())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def test_it_is_adamw_with_the_configured_numbers():
    optimizer = build_optimizer(torch.nn.Linear(2, 2), settings(betas=(0.8, 0.7)))
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.7)
        assert group["lr"] == 0.5


# ---- learning rate


def rates(**fields) -> list[float]:
    config = settings(**fields)
    return [learning_rate(step, config) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_warm_up_rises_to_the_peak_from_its_first_part(schedule):
    values = rates(schedule=schedule, warmup_steps=10)
    assert values[:10] == pytest.approx([0.5 * part / 10 for part in range(1, 11)])
    assert values[10] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_without_warm_up_the_first_step_is_the_peak(schedule):
    assert rates(schedule=schedule)[0] == 0.5


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_warm_up_may_be_the_whole_run(schedule):
    values = rates(schedule=schedule, warmup_steps=100)
    assert values == pytest.approx([0.5 * part / 100 for part in range(1, 101)])
    # and one that asks for more steps than there are is answered too
    assert math.isfinite(learning_rate(100, settings(schedule=schedule, warmup_steps=100)))


@pytest.mark.parametrize(
    ("schedule", "quarter", "half"),
    [("linear", 0.75, 0.5), ("cosine", (1 + math.sqrt(0.5)) / 2, 0.5), ("constant", 1.0, 1.0)],
)
@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_what_is_left_after_a_quarter_and_a_half_of_the_fall(schedule, quarter, half, ratio):
    values = rates(schedule=schedule, warmup_steps=20, final_lr_ratio=ratio)
    if schedule == "constant":
        ratio = 0
    assert values[40] == pytest.approx(0.5 * (ratio + (1 - ratio) * quarter))
    assert values[60] == pytest.approx(0.5 * (ratio + (1 - ratio) * half))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_the_fall_ends_at_the_final_ratio_and_is_never_at_0_before(schedule, ratio):
    config = settings(schedule=schedule, warmup_steps=20, final_lr_ratio=ratio)
    assert learning_rate(100, config) == pytest.approx(0.5 * ratio)
    values = rates(schedule=schedule, warmup_steps=20, final_lr_ratio=ratio)
    assert min(values) > 0
    assert all(later <= earlier for earlier, later in pairwise(values[20:]))


def test_a_run_of_one_step_has_a_rate():
    for schedule in ("linear", "cosine", "constant"):
        assert rates(steps=1, schedule=schedule) == [0.5]
        assert rates(steps=1, warmup_steps=1, schedule=schedule) == [0.5]
