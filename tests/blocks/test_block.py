"""The residual block matches Eq. 9 of the RetNet paper; norm placement, dropout and layer scale."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from seqmix.blocks import Block, BlockConfig
from seqmix.mixers import MixResult
from seqmix.registry import ConfigError

D_MODEL = 8
MIXER = {"kind": "retention", "n_heads": 2}
FFN = {"kind": "mlp", "expansion": 2.0}
LAYERNORM = {"kind": "layernorm"}


def build(**fields: Any):
    """A float64 block with random parameters."""
    config = BlockConfig(**{"mixer": MIXER, "ffn": FFN, "norm": LAYERNORM} | fields)
    block = Block(config, D_MODEL, layer_idx=0, n_layers=1).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return block


def tokens(length=5, batch_size=2):
    return torch.randn(batch_size, length, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def layernorm(x, weight):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


class Constant(nn.Module):
    """Stands in for a mixer, which is called with a call, or for a feed-forward network."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x, call=None):
        y = torch.full_like(x, self.value)
        return y if call is None else MixResult(y, None)


def test_both_branches_read_normalised_input_and_add_to_stream():
    block, x = build(), tokens()
    mixed, _ = block.mixer(layernorm(x, block.mixer_norm.weight))
    after_mixer = x + mixed
    expected = after_mixer + block.ffn(layernorm(after_mixer, block.ffn_norm.weight))
    y, state, *_ = block(x)
    assert_close(y, expected, rtol=1e-9, atol=1e-9)
    assert state is None
    assert block.mixer_norm.weight is not block.ffn_norm.weight


def test_norms_may_be_placed_on_branch_output_or_stream():
    block, x = build(norm_placement="output"), tokens()
    after = x + layernorm(block.mixer(x)[0], block.mixer_norm.weight)
    assert_close(block(x)[0], after + layernorm(block.ffn(after), block.ffn_norm.weight), rtol=1e-9, atol=1e-9)
    block = build(norm_placement="stream")
    stream = layernorm(x, block.mixer_norm.weight)
    after = layernorm(stream + block.mixer(stream)[0], block.ffn_norm.weight)
    assert_close(block(x)[0], after + block.ffn(after), rtol=1e-9, atol=1e-9)


def test_block_without_ffn_only_mixes():
    block, x = build(ffn=None), tokens()
    mixed, _ = block.mixer(layernorm(x, block.mixer_norm.weight))
    assert_close(block(x)[0], x + mixed, rtol=1e-9, atol=1e-9)
    assert {name.partition(".")[0] for name, _ in block.named_parameters()} == {"mixer_norm", "mixer"}
    block.reset_parameters()
    assert_close(block.mixer_norm.weight, torch.ones(D_MODEL, dtype=torch.float64))


@pytest.mark.parametrize("fields", [{}, *({"ffn": None, "dropout": p} for p in (-0.1, 1.0, float("nan")))], ids=str)
def test_missing_ffn_or_invalid_dropout_raises(fields):
    with pytest.raises(ConfigError, match="dropout" if fields else "ffn"):
        BlockConfig(mixer=MIXER, norm=LAYERNORM, **fields)


@pytest.mark.parametrize("branch", ["mixer", "ffn"])
def test_dropout_applies_to_each_branch_output_only_in_training(branch):
    assert torch.equal(build(dropout=0.5)(tokens())[0], build()(tokens())[0])  # in evaluation
    block = build(dropout=0.25, **({"ffn": None} if branch == "mixer" else {})).train()
    block.mixer = Constant(float(branch == "mixer"))
    if branch == "ffn":
        block.ffn = Constant(1.0)
    torch.manual_seed(0)
    y, *_ = block(torch.zeros(8, 64, D_MODEL, dtype=torch.float64))
    assert set(y.unique().tolist()) == {0.0, 1 / 0.75}
    assert y.count_nonzero().item() / y.numel() == pytest.approx(0.75, abs=0.03)


def test_dropout_leaves_residual_stream_unchanged():
    block, x = build(dropout=0.9, ffn=None).train(), tokens()
    block.mixer = Constant(0.0)
    assert torch.equal(block(x)[0], x)


def test_mixer_receives_width_and_layer_index_when_built():
    config = BlockConfig(mixer={"kind": "lightning", "n_heads": 2}, ffn=None, norm=LAYERNORM)
    mixer: Any = Block(config, 12, layer_idx=3, n_layers=7).mixer
    assert (mixer.in_proj.in_features, mixer.layer_idx, mixer.n_layers) == (12, 3, 7)


def test_sandwich_norms_apply_before_and_after_each_branch():
    block, x = build(norm_placement="both"), tokens()
    mixed = block.mixer(layernorm(x, block.mixer_norm.weight))[0]
    after = x + layernorm(mixed, block.mixer_output_norm.weight)
    out = block.ffn(layernorm(after, block.ffn_norm.weight))
    assert_close(block(x)[0], after + layernorm(out, block.ffn_output_norm.weight), rtol=1e-9, atol=1e-9)


def test_parallel_block_applies_one_norm_to_both_branches():
    block, x = build(parallel=True), tokens()
    normed = layernorm(x, block.mixer_norm.weight)
    assert_close(block(x)[0], x + block.mixer(normed)[0] + block.ffn(normed), rtol=1e-9, atol=1e-9)
    assert block.ffn_norm is None
    with pytest.raises(ConfigError, match="parallel = true needs a feed-forward network, got ffn = null"):
        build(parallel=True, ffn=None)


def test_layer_scale_multiplies_each_channel_of_both_branches():
    block, x = build(layer_scale=0.1, residual_scale=2.0), tokens()
    after = x + 2 * block.mixer_scale * block.mixer(layernorm(x, block.mixer_norm.weight))[0]
    expected = after + 2 * block.ffn_scale * block.ffn(layernorm(after, block.ffn_norm.weight))
    assert_close(block(x)[0], expected, rtol=1e-9, atol=1e-9)
    block.reset_parameters()
    assert block.mixer_scale.tolist() == pytest.approx([0.1] * D_MODEL)
    assert block.ffn_scale.tolist() == pytest.approx([0.1] * D_MODEL)
    none = build(layer_scale=0.0)
    none.reset_parameters()
    assert torch.equal(none(x)[0], x)
