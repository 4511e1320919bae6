"""Layers that share parameters, and the residual scale."""

import pytest
import torch
import torch.nn.functional as F

from seqmix import account, build_model, load_run, train
from seqmix.models import compile_blocks
from seqmix.training.config import RunConfig


def hybrid(config_of, **block):
    config = config_of("retention", "attention", n_layers=4)
    blocks = {name: one.model_copy(update=block if name == "block1" else {}) for name, one in config.blocks.items()}
    return config.model_copy(update={"blocks": blocks})


def test_layers_share_one_module_but_keep_separate_states(config_of):
    shared, apart = (build_model(hybrid(config_of, shared=on), dtype=torch.float64) for on in (True, False))
    assert shared.blocks[1] is shared.blocks[3]
    assert shared.blocks[0] is not shared.blocks[2]
    for one, other in zip(apart.blocks, shared.blocks, strict=True):
        one.load_state_dict(other.state_dict())
    for name in ("embedding", "norm", "head"):
        getattr(apart, name).load_state_dict(getattr(shared, name).state_dict())
    tokens = torch.randint(0, 257, (2, 9))
    results = [model(tokens[:, :-1], return_state=True) for model in (shared, apart)]
    torch.testing.assert_close(*(result.logits for result in results))
    assert not torch.equal(results[0].state[1].keys, results[0].state[3].keys)
    torch.testing.assert_close(
        *(model(tokens[:, -1:], result.state).logits for model, result in zip((shared, apart), results, strict=True))
    )
    for result in results:
        F.cross_entropy(result.logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in shared.blocks[1].named_parameters():
        both = sum(apart.blocks[layer].get_parameter(name).grad for layer in (1, 3))
        torch.testing.assert_close(parameter.grad, both)


def test_shared_block_parameters_count_once(config_of):
    config = hybrid(config_of, shared=True)
    cost, model = account(config, length=16), build_model(config)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    apart = account(hybrid(config_of), length=16)
    assert apart.parameters - cost.parameters == cost.layers[1].parameters
    assert apart.state_bytes == cost.state_bytes


@pytest.mark.slow
def test_shared_block_is_compiled_once(config_of):
    model = build_model(hybrid(config_of, shared=True))
    tokens = torch.randint(0, 257, (2, 9))
    expected = model(tokens).logits
    assert compile_blocks(model) == 2
    torch.testing.assert_close(model(tokens).logits, expected)


def test_run_with_shared_blocks_loads_and_retrains_identically(config_of, tmp_path):
    (tmp_path / "text.txt").write_text("a little text, again and again. " * 40)
    training = {"steps": 2, "warmup_steps": 1, "batch_size": 2, "evaluate_every": 2, "learning_rate": 1e-3}
    data = {"kind": "text", "paths": [str(tmp_path / "text.txt")], "sequence_length": 16}
    config = RunConfig(model=hybrid(config_of, shared=True).model_dump(), data=data, training=training)
    list(train(config, tmp_path / "run"))
    model = load_run(tmp_path / "run")
    assert model.blocks[1] is model.blocks[3]
    list(train(config, tmp_path / "again"))
    for one, other in zip(model.parameters(), load_run(tmp_path / "again").parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [0.25, 2.0])
def test_residual_scale_multiplies_both_branches(config_of, scale):
    model = build_model(config_of("retention", n_layers=1), dtype=torch.float64)
    (block,) = model.blocks
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    block.residual_scale = scale
    mixed = x + scale * block.mixer(block.mixer_norm(x))[0]
    torch.testing.assert_close(block(x)[0], mixed + scale * block.ffn(block.ffn_norm(mixed)))
