"""Mixture of experts: definition, gradients, balancing, compilation and checkpoints."""

import pytest
import torch
import torch.nn.functional as F

from seqmix import load_config, load_run, train
from seqmix.blocks.ffn.moe import MoeConfig
from seqmix.models import build_model
from seqmix.training.monitoring.events import Stepped


def built(dtype=torch.float64, width=12, **fields):
    config = MoeConfig(**{"expansion": 1.5, "n_experts": 5, "top_k": 2} | fields)
    moe = config.build(width)
    torch.manual_seed(0)
    with torch.no_grad():
        moe.reset_parameters()
        moe.bias.copy_(torch.linspace(-0.1, 0.1, config.n_experts))
    return moe.to(dtype)


def shared_of(moe, token):
    gate = 1 if moe.shared_gate is None else (token @ moe.shared_gate.weight[0]).sigmoid()
    return gate * moe.shared(token)


def written_out(moe, x):
    """Token by token, expert by expert."""
    config, rows = moe.config, []
    for token in x.flatten(0, 1):
        logits = token @ moe.router.weight.mT
        scores = logits.sigmoid() if config.score_function == "sigmoid" else logits.softmax(-1)
        chosen = (scores + moe.bias).argsort(descending=True)[: config.top_k]
        y = 0
        for expert in chosen.tolist():
            hidden = F.silu(token @ moe.gate_proj.weight[expert]) * (token @ moe.up_proj.weight[expert])
            weight = scores[expert] / scores[chosen].sum() if config.renormalize else scores[expert]
            y = y + weight * (hidden @ moe.down_proj.weight[expert])
        rows.append(config.routed_scale * y + (shared_of(moe, token) if moe.shared is not None else 0))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"score_function": "softmax", "routed_scale": 2.5},
        {"shared_expansion": 1.0, "top_k": 1},
        {"top_k": 5},
        {"shared_expansion": 0.5, "shared_gate": True},
        {"score_function": "softmax", "renormalize": False},
    ],
    ids=str,
)
def test_output_and_gradients_match_definition(fields):
    moe = built(**fields)
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    leaves = [x, *moe.parameters()]
    y, expected = moe(x), written_out(moe, x)
    above = torch.randn_like(y)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    found, wanted = (torch.autograd.grad(z, leaves, above) for z in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_close_to_float64(dtype):
    # aligned widths, so that bfloat16 takes torch's grouped product
    moe, exact = built(dtype, width=16), built(width=16)
    exact.load_state_dict({name: tensor.double() for name, tensor in moe.state_dict().items()})
    x = torch.randn(3, 5, 16).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    results = []
    for module, tokens in ((moe, x), (exact, wide)):
        y = module(tokens)
        above = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append([y, *torch.autograd.grad(y, [tokens, *module.parameters()], above)])
    for found, wanted in zip(*results, strict=True):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < (1e-5 if dtype == torch.float32 else 3e-2)


def test_each_token_depends_only_on_itself():
    moe = built()
    x = torch.randn(1, 40, 12, dtype=torch.float64)
    together = moe(x)
    alone = torch.cat([moe(token) for token in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-13)


def test_balancing_lowers_bias_of_overloaded_experts():
    moe = built(top_k=1, balance_rate=0.01).train()
    moe.bias.zero_()
    moe(torch.randn(4, 50, 12, dtype=torch.float64)).sum().backward()
    load = moe.load.clone()
    assert load.sum() == 200
    assert moe.balance(lambda x: x) == pytest.approx((load.max() / load.mean() - 1).item())
    torch.testing.assert_close(moe.bias, 0.01 * (load.mean() - load).sign())
    assert not moe.load.any()
    with torch.no_grad():
        moe(torch.randn(4, 50, 12, dtype=torch.float64))
    assert not moe.load.any()  # evaluation counts nothing


def test_repeated_balancing_evens_the_load():
    """All tokens prefer the same experts at first."""
    moe = built(torch.float32, width=16, n_experts=8, top_k=2, balance_rate=0.02).train()
    moe.bias.zero_()
    x = torch.randn(8, 64, 16) + 2
    violations = []
    for _ in range(100):
        moe(x).sum().backward()
        violations.append(moe.balance(lambda x: x))
    assert violations[0] > 1.0
    assert violations[-1] < 0.4 * violations[0]


def test_more_experts_per_token_than_experts_raises():
    with pytest.raises(ValueError, match="top_k must be at most n_experts = 5, got 6"):
        built(top_k=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_compile_to_one_graph_for_any_load(dtype):
    moe = built(dtype, width=16)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(2, 9, 16).to(dtype)
        torch.testing.assert_close(compiled(x), moe(x))


def run(tmp_path, *changes):
    (tmp_path / "text.txt").write_text("a little text, again and again. " * 40)
    ffn = "{kind: moe, n_experts: 4, top_k: 2, expansion: 0.25, balance_rate: 0.05}"
    return load_config(
        "retnet-tiny",
        [
            f"data.paths=[{tmp_path}/text.txt]",
            f"model.blocks.ret.ffn={ffn}",
            "training.steps=3",
            "training.warmup_steps=1",
            "training.batch_size=2",
            "data.sequence_length=24",
            *changes,
        ],
    )


def test_training_logs_load_violation_and_checkpoint_keeps_bias(tmp_path):
    steps = [event for event in train(run(tmp_path), tmp_path / "run") if isinstance(event, Stepped)]
    assert all(event.expert_violation is not None and event.expert_violation >= 0 for event in steps)
    assert "expert_violation" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert all(block.ffn.bias.any() for block in load_run(tmp_path / "run").blocks)


def test_normal_init_applies_to_experts(tmp_path):
    model = build_model(run(tmp_path, "model.init={kind: normal, std: 0.5}").model)
    assert model.blocks[0].ffn.up_proj.weight.std().item() == pytest.approx(0.5, rel=0.05)
