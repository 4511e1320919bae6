"""Loops over shared blocks match the same layers written out."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from seqmix import ModelConfig, Paradigm, account, build_model
from seqmix.mixers.base.roles import roles_of

NORM = {"kind": "rmsnorm"}
FFN = {"kind": "mlp", "expansion": 2.0}
BLOCKS = {
    name: {"mixer": {"kind": kind, "n_heads": 2}, "ffn": FFN, "norm": NORM, "shared": shared}
    for name, kind, shared in (("a", "retention", True), ("b", "attention", True), ("end", "attention", False))
}
PATTERN = ("end", "a", "b", "a", "b", "a", "b", "end")
LOOP = {"embedding": True, "injection": 0.25, "scale": True}


def config_of(loop: dict[str, Any] | None, pattern: tuple[str, ...] = PATTERN, **fields: Any) -> ModelConfig:
    blocks = {name: BLOCKS[name] for name in dict.fromkeys(pattern)}
    model = {"d_model": 8, "n_layers": len(pattern), "vocab_size": 17, "blocks": blocks, "pattern": pattern}
    return ModelConfig.model_validate(model | {"norm": NORM, "loop": loop} | fields)


def build(loop: dict[str, Any] | None, *, spread: float = 0.3):
    model = build_model(config_of(loop), dtype=torch.float64)
    if spread and model.loop is not None:
        with torch.no_grad():
            for parameter in model.loop.parameters():
                parameter.add_(spread * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 17, (2, 7), generator=torch.Generator().manual_seed(2))


def gradients(model):
    model.zero_grad()
    model(tokens(), targets=tokens().roll(-1, 1)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_iterations_match_explicit_layers():
    model = build(LOOP)
    x = start = model.embedding.weight[tokens()]
    for layer, block in enumerate(model.blocks):
        shared = 1 <= layer <= 6
        if layer in (1, 3, 5):
            x = x + model.loop.embedding[layer // 2]
            x = x + (0 if layer == 1 else model.loop.injection * start)
        x = x + block.mixer(block.mixer_norm(x))[0] / (3 if shared else 1)
        x = x + block.ffn(block.ffn_norm(x)) / (3 if shared else 1)
    assert_close(model(tokens()).logits, model.norm(x) @ model.head.weight.T)


def test_loop_at_initialisation_matches_plain_shared_blocks():
    plain, model = build(None), build({"embedding": True, "injection": 0.0}, spread=0)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(model(tokens()).logits, plain(tokens()).logits)
    assert all(gradient.any() for gradient in gradients(model).values())


def test_every_iteration_keeps_its_own_state():
    model = build(LOOP)
    whole = model(tokens()).logits
    state, logits = None, []
    for token in tokens().split(1, dim=1):
        paradigms = model.prefer(Paradigm.RECURRENT, from_state=True)
        output = model(token, state, paradigm=paradigms, return_state=True)
        state = output.state
        logits.append(output.logits)
    assert_close(torch.cat(logits, 1), whole)
    assert len(state) == 8
    assert not torch.equal(state[1].memory, state[3].memory)
    packed = model(tokens().flatten()[None], cu_seqlens=torch.tensor([0, 7, 14])).logits
    assert_close(packed.view_as(whole), whole)


@pytest.mark.parametrize("saved", [True, "matmuls"])
def test_checkpointing_keeps_gradients_bitwise_equal(saved):
    model = build(LOOP)
    expected = gradients(model)
    model.activation_checkpointing = saved
    assert_close(gradients(model), expected, rtol=0, atol=0)


def test_parameters_are_counted_and_have_roles():
    model = build(LOOP)
    assert account(model.config, length=16).parameters == sum(p.numel() for p in model.parameters())
    assert {roles_of(model)[f"loop.{name}"].role for name in ("embedding", "injection")} == {"vector"}
    assert model.loop.embedding.shape == (3, 8)


@pytest.mark.parametrize(
    ("pattern", "fields", "message"),
    [
        (("end", "end"), {}, "loop needs a block that several layers share: set shared = true"),
        (("a", "b", "a", "b", "a"), {}, "equally many layers, got a 3, b 2"),
        (PATTERN, {"residual": {"kind": "hyper"}}, "loop needs the residual connection plain, got hyper"),
    ],
)
def test_invalid_loop_settings_raise(pattern, fields, message):
    with pytest.raises(ValueError, match=message):
        config_of(LOOP, pattern, **fields)
