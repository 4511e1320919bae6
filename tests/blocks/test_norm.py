"""Norms of the residual stream: the formulas written out."""

import importlib
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from seqmix.blocks import NORMS, Block, BlockConfig
from seqmix.blocks.norm.layernorm import LayerNormConfig
from seqmix.blocks.norm.rmsnorm import RmsNormConfig

D_MODEL = 6

MINE = """
from typing import Literal
from torch import nn
from seqmix.blocks import NormConfig

class MaxNormConfig(NormConfig):
    kind: Literal["maxnorm"] = "maxnorm"
    eps: float = 0.5
    def build(self, d_model):
        return MaxNorm(self.eps)

class MaxNorm(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.eps = eps
    def forward(self, x):
        return x / (x.abs().amax(-1, keepdim=True) + self.eps)
    def reset_parameters(self):
        pass
"""


def tokens():
    return 3 + 2 * torch.randn(2, 5, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def randomised(norm):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(D_MODEL, generator=generator))
    return norm.double()


@pytest.mark.parametrize("eps", [1e-5, 0.5, 0.0])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layernorm_is_its_formula(eps, bias):
    norm, x = randomised(LayerNormConfig(eps=eps, bias=bias).build(D_MODEL)), tokens()
    variance = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    expected = (x - x.mean(-1, keepdim=True)) / (variance + eps).sqrt() * norm.weight
    assert_close(norm(x), expected + norm.bias if bias else expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eps", [1e-6, 0.5, 0.0])
def test_an_rmsnorm_is_its_formula(eps):
    norm, x = randomised(RmsNormConfig(eps=eps).build(D_MODEL)), tokens()
    expected = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
    assert_close(norm(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "eps", "names"),
    [
        (LayerNormConfig(), 1e-5, ["weight"]),
        (LayerNormConfig(bias=True), 1e-5, ["weight", "bias"]),
        (RmsNormConfig(), 1e-6, ["weight"]),
    ],
)
def test_a_norm_starts_as_the_plain_formula(config, eps, names):
    assert config.eps == eps
    norm = randomised(config.build(D_MODEL))
    norm.reset_parameters()
    assert [name for name, _ in norm.named_parameters()] == names
    for name, parameter in norm.named_parameters():
        assert_close(parameter, torch.full_like(parameter, 1.0 if name == "weight" else 0.0))
    with pytest.raises(ValidationError, match="eps"):
        type(config)(eps=-1e-9)


def test_the_files_of_the_folder_are_the_kinds():
    folder = Path(importlib.import_module("seqmix.blocks.norm").__file__).parent
    assert NORMS.kinds() == sorted(file.stem for file in folder.glob("*.py") if file.stem not in ("__init__", "norm"))


def test_a_dotted_path_is_a_kind(tmp_path, monkeypatch):
    (tmp_path / "my_norms.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    config = BlockConfig(
        mixer={"kind": "retention", "n_heads": 1}, ffn=None, norm={"kind": "my_norms:MaxNormConfig", "eps": 0.25}
    )
    block, x = Block(config, D_MODEL, layer_idx=0, n_layers=1).double(), tokens()
    assert_close(block.mixer_norm(x), x / (x.abs().amax(-1, keepdim=True) + 0.25), rtol=1e-9, atol=1e-9)
    block.reset_parameters()
