"""The value residuals of RWKV-7 match their explicit formula in every use of a model."""

import pytest
import torch
from rwkv7_formula import rwkv7_written_out

from seqmix import ContractError, Paradigm, build_model, load_config
from seqmix.mixers import LayerCall
from seqmix.mixers.rwkv7 import RWKV7Config
from seqmix.models import compile_blocks

RWKV = {"mixer": {"kind": "rwkv7", "n_heads": 2, "rank": 3, "chunk_size": 4}, "ffn": None, "norm": {"kind": "rmsnorm"}}
OTHER = {"mixer": {"kind": "retention", "n_heads": 2, "chunk_size": 4}, "ffn": None, "norm": {"kind": "rmsnorm"}}


def config_of(*pattern, **rwkv):
    blocks = {"rwkv": RWKV | rwkv, "last": RWKV, "other": OTHER}
    small = {"d_model": 12, "n_layers": len(pattern), "pattern": list(pattern)}
    model = load_config("retnet-tiny").model.model_dump() | small
    return type(load_config("retnet-tiny").model).model_validate(
        model | {"blocks": {name: blocks[name] for name in pattern}}
    )


def model_of(*pattern, **rwkv):
    model = build_model(config_of(*pattern, **rwkv), dtype=torch.float64)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tokens(length=9, batch_size=2):
    return torch.randint(0, 257, (batch_size, length), generator=torch.Generator().manual_seed(0))


def exactly(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def by_hand(model, x):
    """Logits, with layers of RWKV-7 token by token."""
    hidden, first = model.embedding.weight[x], None
    for block in model.blocks:
        normed = block.mixer_norm(hidden)
        if block.mixer.kind == "rwkv7":
            y, _, values = rwkv7_written_out(block.mixer, normed, first)
            first = values if first is None else first
        else:
            y = block.mixer(normed)[0]
        hidden = hidden + y
    return model.norm(hidden) @ model.head.weight.T


PATTERNS = {
    "two layers": ("rwkv", "rwkv"),
    "three, of two blocks": ("rwkv", "last", "rwkv"),
    "a hybrid": ("other", "rwkv", "other", "rwkv"),
}


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("paradigm", sorted(RWKV7Config(n_heads=2).traits.paradigms))
def test_model_matches_explicit_formula(pattern, paradigm):
    model, x = model_of(*pattern), tokens()
    takes = [block.mixer.takes_first_values for block in model.blocks if block.mixer.kind == "rwkv7"]
    assert takes == [False, *([True] * (len(takes) - 1))]
    exactly(model(x, paradigm=paradigm).logits, by_hand(model, x))


def test_gradients_match_formula_with_and_without_checkpointing():
    model, x = model_of("rwkv", "other", "rwkv", "rwkv"), tokens()
    above = torch.randn(2, 9, 257, dtype=torch.float64)
    expected = torch.autograd.grad(by_hand(model, x), list(model.parameters()), above)
    assert all(gradient.any() for gradient in expected)
    for model.activation_checkpointing in (False, True):
        exactly(torch.autograd.grad(model(x).logits, list(model.parameters()), above), expected)


def test_decoding_continues_from_prefill():
    model, x = model_of("other", "rwkv", "rwkv"), tokens()
    whole = by_hand(model, x)
    output = model(x[:, :4], return_state=True)
    exactly(output.logits, whole[:, :4])
    for t in range(4, 9):
        output = model(x[:, t : t + 1], output.state, paradigm=Paradigm.RECURRENT, return_state=True)
        exactly(output.logits[:, 0], whole[:, t])


def test_packed_documents_use_separate_first_values():
    model, x = model_of("rwkv", "rwkv", "rwkv"), tokens(9, 1)
    packed = model(x, cu_seqlens=torch.tensor([0, 4, 4, 9])).logits
    exactly(packed, torch.cat((by_hand(model, x[:, :4]), by_hand(model, x[:, 4:])), dim=1))


@pytest.mark.slow
def test_compiled_blocks_pass_on_first_values():
    model, x = model_of("rwkv", "rwkv", "rwkv"), tokens()
    expected = by_hand(model, x)
    compile_blocks(model)
    exactly(model(x).logits, expected)


def test_shared_block_takes_or_provides_first_values():
    model, x = model_of("last", "rwkv", "rwkv", shared=True), tokens()
    assert model.blocks[1] is model.blocks[2]
    assert model.blocks[2].mixer.takes_first_values
    exactly(model(x).logits, by_hand(model, x))
    model = model_of("rwkv", "rwkv", "last", shared=True)  # what is shared gives them itself
    assert [block.mixer.takes_first_values for block in model.blocks] == [False, False, True]
    exactly(model(x).logits, by_hand(model, x))


def test_first_values_without_declaration_raise():
    alone = RWKV7Config(n_heads=2).build(12, layer_idx=1, n_layers=2)
    x = torch.randn(1, 3, 12)
    with pytest.raises(ContractError, match="accept_first_values"):
        alone(x, call=LayerCall(first_values=x))
    alone.accept_first_values()
    with pytest.raises(ContractError, match="first_values"):
        alone(x)
    with pytest.raises(ContractError, match=r"\[1, 3, 12\].*\[1, 2, 12\]"):
        alone(x, call=LayerCall(first_values=x[:, 1:]))
    other = model_of("other").blocks[0].mixer
    with pytest.raises(ContractError, match="value_residual"):
        other(x.double(), call=LayerCall(return_values=True))
    with pytest.raises(ContractError, match="value_residual"):
        other.accept_first_values()
