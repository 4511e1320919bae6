"""The residual block: Eq. 9 of the RetNet paper written out, and what it hands to its mixer."""

from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.testing import assert_close

from seqmix import MixerConfig, Paradigm, SequenceMixer, Traits
from seqmix.blocks import Block, BlockConfig

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


class Recorder(nn.Module):
    """Stands in for a mixer: returns a constant and records its arguments."""

    def __init__(self, value: float, state: Any = None) -> None:
        super().__init__()
        self.value, self.state, self.given = value, state, {}

    def forward(self, x, state=None, **options):
        self.given = {"x": x, "state": state, **options}
        return torch.full_like(x, self.value), self.state


class Constant(nn.Module):
    """Stands in for a feed-forward network."""

    def forward(self, x):
        return torch.ones_like(x)


def test_both_branches_read_a_normed_copy_and_add_to_the_stream():
    block, x = build(), tokens()
    mixed, _ = block.mixer(layernorm(x, block.mixer_norm.weight))
    after_mixer = x + mixed
    expected = after_mixer + block.ffn(layernorm(after_mixer, block.ffn_norm.weight))
    assert_close(block(x)[0], expected, rtol=1e-9, atol=1e-9)
    assert block.mixer_norm.weight is not block.ffn_norm.weight


def test_a_block_without_ffn_only_mixes():
    block, x = build(ffn=None), tokens()
    mixed, _ = block.mixer(layernorm(x, block.mixer_norm.weight))
    assert_close(block(x)[0], x + mixed, rtol=1e-9, atol=1e-9)
    assert {name.partition(".")[0] for name, _ in block.named_parameters()} == {"mixer_norm", "mixer"}
    block.reset_parameters()
    assert_close(block.mixer_norm.weight, torch.ones(D_MODEL, dtype=torch.float64))


@pytest.mark.parametrize("fields", [{}, *({"ffn": None, "dropout": p} for p in (-0.1, 1.0, float("nan")))], ids=str)
def test_an_ffn_is_given_or_null_and_dropout_a_probability(fields):
    with pytest.raises(ValidationError, match="dropout" if fields else "ffn"):
        BlockConfig(mixer=MIXER, norm=LAYERNORM, **fields)


@pytest.mark.parametrize("branch", ["mixer", "ffn"])
def test_dropout_thins_the_output_of_each_branch_in_training(branch):
    assert torch.equal(build(dropout=0.5)(tokens())[0], build()(tokens())[0])  # in evaluation
    block = build(dropout=0.25).train()
    block.mixer = Recorder(1.0 if branch == "mixer" else 0.0)
    block.ffn = Constant() if branch == "ffn" else None
    torch.manual_seed(0)
    y, _ = block(torch.zeros(8, 64, D_MODEL, dtype=torch.float64))
    assert set(y.unique().tolist()) == {0.0, 1 / 0.75}
    assert y.count_nonzero().item() / y.numel() == pytest.approx(0.75, abs=0.03)


def test_dropout_never_touches_the_stream_itself():
    block, x = build(dropout=0.9, ffn=None).train(), tokens()
    block.mixer = Recorder(0.0)
    assert torch.equal(block(x)[0], x)


def test_arguments_reach_the_mixer_and_its_state_comes_back():
    block = build()
    block.mixer = Recorder(0.0, state=("after",))
    boundaries = torch.tensor([0, 2, 5])
    _, state = block(
        tokens(batch_size=1), ("before",), paradigm=Paradigm.RECURRENT, cu_seqlens=boundaries, return_state=True
    )
    given = block.mixer.given
    assert state == ("after",)
    assert given["state"] == ("before",)
    assert given["paradigm"] is Paradigm.RECURRENT
    assert given["cu_seqlens"] is boundaries
    assert given["return_state"] is True
    block(tokens())
    assert block.mixer.given["return_state"] is False


class SizedConfig(MixerConfig):
    """A mixer that records the sizes it was built for."""

    kind: Literal["sized"] = "sized"
    paradigm: Paradigm = Paradigm.PARALLEL

    @property
    def traits(self) -> Traits:
        return Traits(paradigms=frozenset(Paradigm), state="constant", packing=False, shift_invariant=True)

    def build(self, d_model: int, *, layer_idx: int, n_layers: int) -> SequenceMixer[Any]:
        mixer: Any = nn.Identity()
        mixer.sizes = (d_model, layer_idx, n_layers)
        return mixer


def test_a_mixer_learns_its_parents_sizes_when_it_is_built():
    config = BlockConfig(mixer=SizedConfig(), ffn=None, norm=LAYERNORM)
    block: Any = Block(config, 12, layer_idx=3, n_layers=7)
    assert block.mixer.sizes == (12, 3, 7)


def test_reset_parameters_reaches_every_parameter():
    block = build(mixer={**MIXER, "learnable_decay": True}, norm={"kind": "layernorm", "bias": True})
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(torch.nan)
    block.reset_parameters()
    assert not any(parameter.isnan().any() for parameter in block.parameters())
