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
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(config_of, preset, overrides, kind):
    model = build_model(config_of(*overrides, "model.n_layers=4", preset=preset).model)
    optimizer = build_optimizer(model, settings(optimizer=kind))
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


# ---- Muon


@pytest.fixture
def muon(config_of):
    model = build_model(config_of("model.blocks.ret.mixer.learnable_decay=true").model)
    return model, build_optimizer(model, settings(optimizer="muon", weight_decay=0.3, muon_momentum=0.8))


def test_muon_has_the_matrices_of_blocks_and_adamw_the_rest(muon):
    model, optimizer = muon
    adamw, of_matrices = optimizer.optimizers
    assert (type(adamw), type(of_matrices)) == (torch.optim.AdamW, torch.optim.Muon)
    (group,) = of_matrices.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.8, 0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moved = {names[id(parameter)] for parameter in group["params"]}
    maps = ("mixer.in_proj", "mixer.out_proj", "ffn.up_proj", "ffn.down_proj")
    assert moved == {f"blocks.{layer}.{name}.weight" for layer in range(2) for name in maps}


def test_both_step_forget_gradients_and_take_the_rate(muon):
    model, optimizer = muon
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    model(torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(optimizer.state[parameter] for parameter in model.parameters())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_muon_step_is_as_long_as_one_of_adamw():
    """An update has a root mean square of 0.2 learning rates, whatever the matrix's shape."""
    for shape in ((64, 16), (16, 64), (32, 32)):
        model = torch.nn.Module()
        model.blocks = torch.nn.ModuleList([torch.nn.Linear(shape[1], shape[0], bias=False)])
        model.head = torch.nn.Linear(2, 2)
        matrix = model.blocks[0].weight
        before = matrix.detach().clone()
        optimizer = build_optimizer(model, settings(optimizer="muon", weight_decay=0.0))
        matrix.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        assert (matrix - before).square().mean().sqrt().item() == pytest.approx(0.2 * 0.5, rel=0.3)


def test_what_is_kept_from_the_start_changes_no_step():
    """Moments that are there before the first step are those that it would have made."""
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    stepped = []
    for make in (
        lambda layer: build_optimizer(layer, settings(weight_decay=0.1)),
        lambda layer: torch.optim.AdamW(layer.parameters(), lr=0.5, betas=(0.9, 0.98), weight_decay=0.1, fused=True),
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


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_warm_up_stable_decay(ratio):
    values = rates(schedule="wsd", warmup_steps=10, decay_steps=20, final_lr_ratio=ratio)
    assert values[:10] == pytest.approx([0.5 * part / 10 for part in range(1, 11)])
    assert values[10:81] == [0.5] * 71
    assert values[90] == pytest.approx(0.5 * (1 + ratio) / 2)
    assert values[99] == pytest.approx(0.5 * (1 - (1 - ratio) * 19 / 20))


def test_longer_training_leaves_the_steps_before_the_decay_as_they_were():
    short = settings(schedule="wsd", warmup_steps=10, decay_steps=20)
    longer = settings(schedule="wsd", warmup_steps=10, decay_steps=20, steps=200)
    assert all(learning_rate(step, short) == learning_rate(step, longer) for step in range(81))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"schedule": "wsd"}, "schedule wsd needs decay_steps"),
        ({"schedule": "cosine", "decay_steps": 5}, "decay_steps belongs to schedule wsd, and the schedule is cosine"),
        ({"schedule": "wsd", "decay_steps": 95, "warmup_steps": 10}, "must fit into steps, and 10 \\+ 95 is above 100"),
    ],
)
def test_steps_of_decay_belong_to_their_schedule(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        settings(**fields)


def test_a_run_of_one_step_has_a_rate():
    for schedule in ("linear", "cosine", "constant"):
        assert rates(steps=1, schedule=schedule) == [0.5]
        assert rates(steps=1, warmup_steps=1, schedule=schedule) == [0.5]
